/** Keeps the store as the server is: its events, and what they do not bring. */
import { modelPath, request, serverNow } from "./api.js";
import { follow } from "./follow.js";
import { changed, store } from "./store.js";

const LOOK_S = 1; // how often the server looks whether its status is news
const INCLUDE = "include=blocks&include=frontier";

/**
 * Follows the server's events until it is told to stop.
 *
 * @param {AbortSignal} signal
 * @returns {Promise<import("./api.js").ApiError|null>} why we may follow no more; null: it was ended
 */
export function keepUp(signal) {
  return follow("/models/events", (event) => take(event, signal), signal, (state) => {
    if (store.connection === state) return;
    store.connection = state;
    changed("connection");
  });
}

/**
 * @param {any} event
 * @param {AbortSignal} signal
 */
function take(event, signal) {
  if (event.type === "snapshot") snapshot(event, signal);
  else if (event.type === "status") status(event);
  else if (event.type === "model") model(event.model, signal);
  else if (event.type === "model.deleted") gone(event.id);
  else if (event.type === "job") job(event.job);
}

/**
 * @param {{models: import("./types.js").Model[], jobs: import("./types.js").Job[]}} event
 * @param {AbortSignal} signal
 */
function snapshot(event, signal) {
  const before = new Map(store.models);
  store.models.clear();
  for (const one of event.models) store.models.set(one.id, withUse(one, before.get(one.id)));
  for (const id of [...store.details.keys()]) if (!store.models.has(id)) store.details.delete(id);
  store.told.add("models");
  changed("models", "details");
  void allJobs(signal);
  void allDetails(signal);
}

/** @param {import("./types.js").Status & {type: string}} event */
function status(event) {
  const before = store.status;
  // Nothing is said while nothing changes: after a silence, what is new is of the last look alone.
  const since = before === null ? 0 : event.time - before.time;
  const seconds = since > 2 * LOOK_S ? LOOK_S : since;
  store.rates = { generation: 0, models: new Map() };
  if (before !== null && seconds > 0) {
    store.rates.generation = rate(event.totals, before.totals, seconds);
    for (const [id, load] of Object.entries(event.models)) {
      const fresh = rate(load, before.models[id] ?? load, seconds);
      store.rates.models.set(id, fresh);
      const known = store.models.get(id);
      if (known !== undefined && (fresh > 0 || load.running > 0)) known.last_used_at = serverNow();
    }
  }
  store.status = event;
  changed("status");
}

/**
 * @param {{generation_tokens: number}} now
 * @param {{generation_tokens: number}} before
 * @param {number} seconds between them
 * @returns {number} tokens per second; totals begin anew with the server, and are no rate then
 */
function rate(now, before, seconds) {
  return Math.max(now.generation_tokens - before.generation_tokens, 0) / seconds;
}

/**
 * @param {import("./types.js").Model} now
 * @param {AbortSignal} signal
 */
function model(now, signal) {
  const before = store.models.get(now.id);
  store.models.set(now.id, withUse(now, before));
  changed("models");
  if (now.plan === null) return;
  if (before?.plan?.digest !== now.plan.digest || !store.details.has(now.id)) {
    void details(now.id, signal);
  }
}

/**
 * @param {import("./types.js").Model} now
 * @param {import("./types.js").Model|undefined} before
 * @returns {import("./types.js").Model} with the later use: records are told of them in batches
 */
function withUse(now, before) {
  const uses = [now.last_used_at, before?.last_used_at].filter((time) => time != null);
  return { ...now, last_used_at: uses.length === 0 ? null : Math.max(...uses) };
}

/** @param {string} id of a model */
function gone(id) {
  store.models.delete(id);
  store.details.delete(id);
  changed("models", "details");
}

/** @param {import("./types.js").Job} now */
function job(now) {
  store.jobs.set(now.id, now);
  newestFirst();
  changed("jobs");
}

function newestFirst() {
  const jobs = [...store.jobs.values()].sort((a, b) => b.created_at - a.created_at);
  store.jobs.clear();
  for (const one of jobs) store.jobs.set(one.id, one);
}

/** @param {AbortSignal} signal */
async function allJobs(signal) {
  const before = [...store.jobs.keys()];
  const found = await unlessRefused(request("GET", "/models/jobs", undefined, signal));
  if (found === null) return;
  const ids = new Set(found.data.map((/** @type {import("./types.js").Job} */ one) => one.id));
  // Of a server that began anew.
  for (const id of before) if (!ids.has(id)) store.jobs.delete(id);
  // Events may have come meanwhile; what they say is newer, unless the job is of before a break.
  for (const one of found.data) {
    const known = store.jobs.get(one.id);
    if (known === undefined || known.finished_at === null) store.jobs.set(one.id, one);
  }
  newestFirst();
  store.told.add("jobs");
  changed("jobs");
}

/** @param {AbortSignal} signal */
async function allDetails(signal) {
  const found = await unlessRefused(request("GET", `/models?${INCLUDE}`, undefined, signal));
  if (found === null) return;
  for (const one of found.data) remember(one);
  store.told.add("details");
  changed("details");
}

/**
 * @param {string} id
 * @param {AbortSignal} signal
 */
async function details(id, signal) {
  const path = `${modelPath(id)}?${INCLUDE}`;
  const found = await unlessRefused(request("GET", path, undefined, signal));
  if (found === null) return;
  remember(found);
  changed("details");
}

/** @param {import("./types.js").Model & {details?: Partial<import("./types.js").Details>}} found */
function remember(found) {
  // Of a plan that is not its model's any more, or of one that is gone.
  if (store.models.get(found.id)?.plan?.digest !== found.plan?.digest) return;
  const { blocks = null, frontier = null } = found.details ?? {};
  store.details.set(found.id, { blocks, frontier });
}

/**
 * @param {Promise<any>} asked
 * @returns {Promise<any|null>} null: refused or ended; the next snapshot asks again
 */
async function unlessRefused(asked) {
  try {
    return await asked;
  } catch (error) {
    console.debug("not fetched:", error);
    return null;
  }
}
