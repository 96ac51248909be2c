/** The line under the header: whether the server is well, and what it is doing. */
import { fill, h, say } from "./dom.js";
import { figure, percent } from "./format.js";
import { store, subscribe } from "./store.js";

const ROLLING = { connecting: "Connecting", lost: "Reconnecting" };

/** @param {HTMLElement} line */
export function mountState(line) {
  const chip = h("span", { class: "chip" });
  const word = h("span", { role: "status" }, chip);
  const reason = h("span", { class: "reason" });
  const figures = h("dl", { class: "figures" });
  const shown = {
    rate: pair(figures, "tok/s"),
    running: pair(figures, "running"),
    waiting: pair(figures, "waiting"),
    kv: pair(figures, "KV pages"),
    hits: pair(figures, "prefix hits"),
  };
  fill(line, word, reason, figures);

  function draw() {
    const { tone, text, why } = verdict();
    line.hidden = store.connection === "off";
    chip.dataset.tone = tone;
    say(chip, text);
    say(reason, why ?? "");
    const { status } = store;
    figures.hidden = status === null;
    if (status === null) return;
    if (store.connection !== "live") {
      for (const value of Object.values(shown)) say(value, "–"); // as it was is not how it is
      return;
    }
    say(shown.rate, figure(store.rates.generation));
    say(shown.running, String(status.running));
    say(shown.waiting, String(status.waiting));
    say(shown.kv, percent(status.kv_usage_ratio));
    const { prefix_queries: queries, prefix_hits: hits } = status.totals;
    say(shown.hits, percent(hits / queries));
    /** @type {HTMLElement} */ (shown.hits.parentElement).hidden = queries === 0;
  }

  subscribe((topics) => {
    if (topics.has("status") || topics.has("connection") || topics.has("session")) draw();
  });
  draw();
}

/** @returns {{tone: "good"|"warn"|"bad"|"plain", text: string, why: string|null}} */
function verdict() {
  const { connection, status } = store;
  if (connection === "connecting" || connection === "lost") {
    const tone = connection === "lost" ? "bad" : "plain";
    const why = connection === "lost" ? "The server cannot be reached; what is shown may be old." : null;
    return { tone, text: ROLLING[connection], why };
  }
  if (status === null) return { tone: "plain", text: "Connected", why: null };
  if (status.engine !== "running") {
    const isSaid = status.reason === `the engine is ${status.engine}`;
    return { tone: "bad", text: `Engine ${status.engine}`, why: isSaid ? null : status.reason };
  }
  if (!status.ready) return { tone: "warn", text: "Not ready", why: status.reason };
  if (status.reason !== null) return { tone: "warn", text: "Degraded", why: status.reason };
  return { tone: "good", text: "Ready", why: null };
}

/**
 * @param {HTMLElement} list
 * @param {string} name
 * @returns {HTMLElement} where the value goes
 */
function pair(list, name) {
  const value = h("dd");
  list.append(h("div", {}, h("dt", {}, name), value));
  return value;
}
