/**
 * What lies in memory, and what separate copies of the same models would take. Pure arithmetic.
 *
 * @typedef {import("./types.js").Model} Model
 * @typedef {Model & {bytes: NonNullable<Model["bytes"]>}} Sized
 *
 * @typedef {object} Totals
 * @property {number} unique what the resident models hold together, in bytes
 * @property {number} separate what as many separate copies would hold
 * @property {number} saved
 * @property {number|null} ratio saved of separate; null without models
 */

/**
 * @param {Iterable<Model>} models
 * @returns {Sized[]} those on the device, family by family, each donor before its variants
 */
export function residents(models) {
  const here = /** @type {Sized[]} */ (
    [...models].filter((model) => model.state === "ready" && model.bytes !== null)
  );
  return here.sort(byFamily);
}

/**
 * @param {Model} a
 * @param {Model} b
 * @returns {number} of Array.sort
 */
export function byFamily(a, b) {
  const families = compare(a.family ?? a.id, b.family ?? b.id);
  if (families !== 0) return families;
  if ((a.donor === null) !== (b.donor === null)) return a.donor === null ? -1 : 1;
  return a.created_at - b.created_at || compare(a.id, b.id);
}

/**
 * @param {Sized[]} models
 * @param {import("./types.js").Status["device"]} [device] what it holds unshared saves nothing
 * @returns {Totals}
 */
export function totals(models, device = null) {
  const unique = sum(models.map((model) => model.bytes.unique));
  const separate = sum(models.map((model) => model.bytes.logical));
  const saved = separate - unique - (device === null ? 0 : unshared(device, unique));
  return { unique, separate, saved, ratio: separate === 0 ? null : saved / separate };
}

/**
 * @param {Sized[]} models
 * @returns {string[]} kinds of rungs that they hold bytes of, the cheapest first
 */
export function kindsOf(models) {
  const order = ["rows", "signs", "int2", "int3", "int4", "lowrank"];
  const held = models.flatMap((model) => Object.entries(model.plan?.rung_bytes ?? {}));
  const found = new Set(held.filter(([, size]) => size > 0).map(([kind]) => kind));
  const rank = (/** @type {string} */ kind) =>
    kind === "own" ? Infinity : order.includes(kind) ? order.indexOf(kind) : order.length;
  return [...found].sort((a, b) => rank(a) - rank(b) || compare(a, b));
}

/**
 * Memory against the number of models of a family, as BS figure 5: what there is, and where it
 * leads if further variants are as large as the mean of those that are there.
 *
 * @param {Sized[]} models of one family, the donor first
 * @param {number} until how many models
 * @returns {{count: number, shared: number, separate: number, isThere: boolean}[]}
 */
export function growth(models, until) {
  const [donor, ...variants] = models;
  const points = [];
  let shared = 0;
  let separate = 0;
  for (const [index, model] of models.entries()) {
    shared += model.bytes.unique;
    separate += model.bytes.logical;
    points.push({ count: index + 1, shared, separate, isThere: true });
  }
  if (donor === undefined || variants.length === 0) return points;
  const unique = sum(variants.map((model) => model.bytes.unique)) / variants.length;
  const logical = sum(variants.map((model) => model.bytes.logical)) / variants.length;
  for (let count = models.length + 1; count <= until; count += 1) {
    shared += unique;
    separate += logical;
    points.push({ count, shared, separate, isThere: false });
  }
  return points;
}

/**
 * @param {Sized[]} models
 * @returns {Sized[]} those of the family with the most of them
 */
export function largestFamily(models) {
  /** @type {Map<string, Sized[]>} */
  const families = new Map();
  for (const model of models) {
    const name = model.family ?? model.id;
    families.set(name, [...(families.get(name) ?? []), model]);
  }
  return [...families.values()].sort((a, b) => b.length - a.length)[0] ?? [];
}

/**
 * The device's budget in parts.
 *
 * @param {NonNullable<import("./types.js").Status["device"]>} device
 * @param {number} unique what the models hold together, in bytes
 * @returns {{token: string, name: string, size: number}[]}
 */
export function deviceParts({ weights, kv, other, free }, unique) {
  const parts = [
    { token: "--c-donor", name: "Weights", size: weights },
    { token: "--c-kv", name: "KV cache", size: kv },
    { token: "--c-other", name: "Other work", size: other },
    { token: "--c-free", name: "Free", size: free },
  ];
  const apart = unshared({ weights }, unique);
  if (apart === 0) return parts;
  parts[0].size = unique;
  parts.splice(1, 0, { token: "--c-own", name: "Unshared, to compare with", size: apart });
  return parts;
}

/**
 * @param {{weights: number}} device
 * @param {number} unique what the models hold together, in bytes
 * @returns {number} bytes of unshared weights, which are in no model's record
 */
function unshared({ weights }, unique) {
  const apart = weights - unique; // a little where records come later than the sum
  return unique === 0 || apart < weights / 1000 ? 0 : apart;
}

/**
 * @param {number[]} values
 * @returns {number}
 */
function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

/**
 * @param {string} a
 * @param {string} b
 * @returns {number} of Array.sort
 */
function compare(a, b) {
  return a === b ? 0 : a < b ? -1 : 1;
}
