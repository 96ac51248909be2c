/** Colours: of the theme, of each model, of kinds of rungs, and of how far a block has moved. */

const MODEL_COLOURS = 8; // --m-1 and so on
const PATTERNS = ["", "/", ".", "x", "-"]; // so that the ninth model is not taken for the first
// Where --e-0 and so on lie, so that equal distances look equally far in OKLab, in both themes.
const STEPS = [0, 0.19, 0.43, 0.71, 1];

/**
 * By model id: a model keeps its colour while the page is open.
 *
 * @type {{donors: Map<string, number>, variants: Map<string, number>}}
 */
const places = { donors: new Map(), variants: new Map() };

/**
 * @param {string} name of a custom property
 * @returns {string} its value in the theme that is shown
 */
export function token(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/**
 * Gives every model its colour, the oldest first.
 *
 * @param {Iterable<import("./types.js").Model>} models
 */
export function giveColours(models) {
  const fresh = [...models].filter((model) => !placesOf(model).has(model.id));
  fresh.sort((a, b) => a.created_at - b.created_at || (a.id < b.id ? -1 : 1));
  for (const model of fresh) placesOf(model).set(model.id, placesOf(model).size);
}

/**
 * @param {import("./types.js").Model} model
 * @returns {{color: string, pattern: string, token: string}} donors are all of one colour, and
 *   differ in their patterns
 */
export function modelColour(model) {
  const place = placesOf(model).get(model.id) ?? 0;
  const name = model.donor === null ? "--c-donor" : `--m-${(place % MODEL_COLOURS) + 1}`;
  const round = model.donor === null ? place : Math.floor(place / MODEL_COLOURS);
  return { color: token(name), pattern: PATTERNS[round % PATTERNS.length], token: name };
}

/** @param {import("./types.js").Model} model */
function placesOf(model) {
  return model.donor === null ? places.donors : places.variants;
}

/**
 * Plotly's way of filling with a colour and a pattern.
 *
 * @param {{color: string, pattern: string}} colour
 * @returns {Record<string, unknown>}
 */
export function filled({ color, pattern }) {
  const line = { color: token("--surface"), width: 1 };
  if (pattern === "") return { color, line };
  const over = { shape: pattern, fgcolor: token("--surface"), size: 6, solidity: 0.25 };
  return { color, line, pattern: { ...over, fillmode: "overlay" } };
}

/** @returns {[number, string][]} from near (0) to far (1) */
export function distanceScale() {
  return STEPS.map((position, step) => [position, token(`--e-${step}`)]);
}

/**
 * @param {string} kind of a rung, such as "own", "rows", "int4" or "lowrank+signs"
 * @returns {string} the name of its colour: residuals are shades of one
 */
export function kindToken(kind) {
  if (kind === "own") return "--c-own";
  if (kind === "rows") return "--c-alias";
  if (kind.startsWith("lowrank")) return "--r-3";
  return kind === "signs" ? "--r-1" : "--r-2";
}
