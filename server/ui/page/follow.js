/** Following the server's events for as long as somebody may look on. */
import { ApiError, request, stream } from "./api.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
const LOOK_MS = 5000; // how often a connection is looked at
const SILENT_MS = 15_000; // the server is asked then whether it is still there
const ANSWER_MS = 10_000; // for which it has so long
const UNSEEN_MS = 60_000; // in a tab that nobody sees; a browser has few connections to a server

/**
 * Follows events for as long as it may: after a break it comes back by itself, sooner at first.
 *
 * @param {string} path
 * @param {(event: any) => void} onEvent
 * @param {AbortSignal} signal which ends it
 * @param {(state: "live"|"connecting"|"lost") => void} [onState]
 * @returns {Promise<ApiError|null>} null: it was ended; else the refusal that waiting cannot mend
 */
export async function follow(path, onEvent, signal, onState = () => {}) {
  let pause = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    const watch = vigil();
    try {
      const both = AbortSignal.any([signal, watch.signal]);
      for await (const event of stream("GET", path, undefined, both)) {
        pause = FIRST_PAUSE_MS;
        watch.heard();
        onState("live");
        onEvent(event);
      }
    } catch (error) {
      if (signal.aborted) return null;
      if (!watch.signal.aborted) {
        if (!(error instanceof ApiError)) throw error;
        if (error.status === 401 || error.status === 403) return error;
      }
    } finally {
      watch.end();
    }
    if (watch.signal.reason === "unseen") {
      onState("connecting");
      await seen(signal);
      continue;
    }
    onState("lost");
    await sleep(pause * (0.75 + Math.random() / 2), signal);
    pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
  }
  return null;
}

/**
 * Watches over one connection, which may have died without a word: its signal ends it where the
 * server is silent and does not answer either, where this machine has slept, or where nobody looks.
 */
function vigil() {
  const own = new AbortController();
  let heardAt = Date.now();
  let lookedAt = heardAt;
  let hiddenAt = heardAt; // of use while the tab is hidden
  let isAsking = false;

  async function look() {
    const now = Date.now();
    const hasSlept = now - lookedAt > SILENT_MS;
    lookedAt = now;
    if (document.hidden) {
      if (now - hiddenAt >= UNSEEN_MS) own.abort("unseen");
      return;
    }
    if (hasSlept) own.abort("stale");
    if (own.signal.aborted || isAsking || now - heardAt < SILENT_MS) return;
    isAsking = true;
    try {
      const limit = AbortSignal.any([own.signal, AbortSignal.timeout(ANSWER_MS)]);
      await request("GET", "/ui/session", undefined, limit);
      heardAt = Date.now();
    } catch (error) {
      console.debug("no answer:", error);
      own.abort("silent");
    } finally {
      isAsking = false;
    }
  }

  function onVisibility() {
    const now = Date.now();
    if (document.hidden) hiddenAt = now;
    else if (now - heardAt > SILENT_MS) own.abort("stale"); // and it is begun anew
  }

  const timer = setInterval(() => void look(), LOOK_MS);
  document.addEventListener("visibilitychange", onVisibility);
  return {
    signal: own.signal,
    heard() {
      heardAt = Date.now();
    },
    end() {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", onVisibility);
    },
  };
}

/**
 * @param {AbortSignal} signal which ends the wait early
 * @returns {Promise<void>} once the tab is seen
 */
function seen(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const end = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", end);
      resolve();
    };
    document.addEventListener("visibilitychange", end);
    signal.addEventListener("abort", end, { once: true });
  });
}

/**
 * @param {number} ms
 * @param {AbortSignal} signal which ends the wait early
 * @returns {Promise<void>}
 */
function sleep(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}
