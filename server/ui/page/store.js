/**
 * What the page knows of the server. Knows nothing of how it is fetched or drawn.
 *
 * @typedef {import("./types.js").Model} Model
 * @typedef {import("./types.js").Job} Job
 * @typedef {import("./types.js").Status} Status
 * @typedef {import("./types.js").Session} Session
 * @typedef {import("./types.js").Details} Details
 * @typedef {import("./types.js").Rates} Rates
 * @typedef {import("./types.js").Study} Study
 *
 * @typedef {"models"|"jobs"|"status"|"session"|"details"|"studies"|"connection"|"theme"} Topic
 * @typedef {(topics: ReadonlySet<Topic>) => void} Listener
 *
 * @typedef {object} Store
 * @property {Set<Topic>} told what the server has told of; before, none may be known or none be there
 * @property {Map<string, Model>} models by id, in the server's order
 * @property {Map<string, Job>} jobs by id, the newest first
 * @property {Map<string, Details>} details by model id; absent until they are fetched
 * @property {Map<string, Study>} studies by family; empty until somebody looks
 * @property {string|null} studiesFault why they could not be fetched
 * @property {Status|null} status null until the server's first word
 * @property {Rates} rates tokens per second since the last status
 * @property {Session|null} session null until the server says who we are
 * @property {"connecting"|"live"|"lost"|"off"} connection of the events; off: we may not follow
 */

/** @type {Store} */
export const store = {
  told: new Set(),
  models: new Map(),
  jobs: new Map(),
  details: new Map(),
  studies: new Map(),
  studiesFault: null,
  status: null,
  rates: { generation: 0, models: new Map() },
  session: null,
  connection: "connecting",
};

/** @type {Set<Listener>} */
const listeners = new Set();

/**
 * Has a listener called after every change, with what has changed.
 *
 * @param {Listener} listener
 * @returns {() => void} which ends it
 */
export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/**
 * Tells every listener; called by whoever has changed the store.
 *
 * @param {...Topic} topics
 */
export function changed(...topics) {
  const told = new Set(topics);
  for (const listener of [...listeners]) listener(told);
}

/** @returns {boolean} whether we may change anything */
export function isAdmin() {
  return store.session?.role === "admin";
}
