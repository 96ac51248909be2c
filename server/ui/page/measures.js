/**
 * What cells can be coloured by: where a value lies between near and far, and how it reads.
 *
 * @typedef {object} Cell
 * @property {number|null} cos
 * @property {number|null} epsilon
 * @property {string} rung
 * @property {number|null} [unique_bytes]
 *
 * @typedef {object} Measure
 * @property {string} name
 * @property {string} about what a colour means
 * @property {(cell: Cell) => number|null} position from 0 (near) to 1 (far); null: not known
 * @property {[number, string][]} scale of colours
 * @property {[number, string][]} ticks of the scale: position and text
 */
import { tenTo } from "./axes.js";
import { bytes, figure } from "./format.js";
import { distanceScale, token } from "./palette.js";

// Fixed, so that a colour means the same on every server: BS finds 0.005 to 0.2.
const EPSILON = { low: 0.003, high: 0.3, ticks: [0.003, 0.01, 0.03, 0.1, 0.3] };
const ANGLE = { low: 1e-6, high: 0.1, ticks: [1e-6, 1e-4, 1e-3, 0.01, 0.1] };

const ABOUT = {
  epsilon: "How far a block's weights moved from the donor's: ‖variant − donor‖ / ‖donor‖, a mean"
    + " over its tensors; 0 is the donor's own (Eq. 2 of the block-sharing paper).",
  cos: "How far a block's weights turned: cos is the cosine between them and the donor's, a mean"
    + " over its tensors; 1 − cos of 0 is the same direction (Eq. 1 of the block-sharing paper).",
};

/** What colours can stand for, by the name that a choice has. */
export const MEASURES = /** @type {const} */ ({
  epsilon: "ε, how far its weights moved",
  cos: "1 − cos, how far they turned",
  rung: "rung, how it is stored",
  bytes: "bytes of its own",
});

/** @typedef {keyof typeof MEASURES} MeasureName */

/**
 * @param {MeasureName} name
 * @param {Iterable<Cell>} cells which a scale of bytes has to hold
 * @returns {Measure}
 */
export function measure(name, cells) {
  if (name === "epsilon") {
    return distance("ε", ABOUT.epsilon, EPSILON, (cell) => cell.epsilon);
  }
  if (name === "cos") {
    return distance("1 − cos", ABOUT.cos, ANGLE,
      (cell) => (cell.cos === null ? null : Math.max(1 - cell.cos, 0)));
  }
  return name === "rung" ? rungs() : sizes(cells);
}

/**
 * @param {string} rung of a block or a tensor
 * @returns {"alias"|"residual"|"own"} tensors' residuals have names of their own
 */
export function rungClass(rung) {
  return rung === "alias" || rung === "own" ? rung : "residual";
}

/**
 * @param {Cell} cell
 * @returns {string} its mark: nothing where the donor's is used
 */
export function rungMark(cell) {
  const rung = rungClass(cell.rung);
  return rung === "alias" ? "" : rung === "own" ? "■" : "○";
}

/**
 * @param {Cell} cell
 * @returns {string[]} everything that is known of it
 */
export function facts(cell) {
  const known = [`rung ${cell.rung}`];
  if (cell.epsilon !== null) known.push(`ε ${figure(cell.epsilon)}`);
  if (cell.cos !== null) known.push(`cos ${cosine(cell.cos)}`);
  if (cell.unique_bytes !== null && cell.unique_bytes !== undefined) {
    known.push(`${bytes(cell.unique_bytes)} of its own`);
  }
  return known;
}

/**
 * @param {number|null|undefined} value
 * @returns {string} with digits enough to see how near 1 it is; 1 where it is that
 */
export function cosine(value) {
  if (value === null || value === undefined) return figure(null);
  const apart = Math.abs(1 - value);
  if (apart < 1e-9) return "1"; // less than what was summed up can tell
  return value.toFixed(Math.max(5, Math.ceil(-Math.log10(apart))));
}

/**
 * What stands at the end of a row: of all its blocks, by what they are coloured by.
 *
 * @param {MeasureName} name
 * @param {Cell[]} cells
 * @param {import("./types.js").Plan|null} plan whose means over the blocks are known
 * @returns {string} "" where it is not known
 */
export function rowEnd(name, cells, plan) {
  if (name === "epsilon") return plan?.mean_epsilon == null ? "" : figure(plan.mean_epsilon, 2);
  if (name === "cos") return plan?.mean_cos == null ? "" : cosine(plan.mean_cos);
  if (name === "rung") {
    const kinds = cells.map((cell) => rungClass(cell.rung));
    return ["alias", "residual", "own"].map((kind) => kinds.filter((one) => one === kind).length)
      .join(" · ");
  }
  const sizes = cells.flatMap((cell) => (cell.unique_bytes == null ? [] : [cell.unique_bytes]));
  return sizes.length === 0 ? "" : bytes(sizes.reduce((total, size) => total + size, 0));
}

/** What stands above those, by the name that a choice has. */
export const ROW_ENDS = /** @type {const} */ ({
  epsilon: "mean ε",
  cos: "mean cos",
  rung: "alias · res. · own",
  bytes: "together",
});

/**
 * @param {string} name
 * @param {string} about
 * @param {{low: number, high: number, ticks: number[]}} range
 * @param {(cell: Cell) => number|null} value
 * @returns {Measure}
 */
function distance(name, about, { low, high, ticks }, value) {
  const place = (/** @type {number} */ x) =>
    Math.min(Math.max(Math.log(x / low) / Math.log(high / low), 0), 1);
  return {
    name,
    about,
    position: (cell) => {
      const x = value(cell);
      return x === null ? null : x === 0 ? 0 : place(x);
    },
    scale: distanceScale(),
    ticks: ticks.map((tick) => [place(tick),
      `${tick === low ? "≤ " : tick === high ? "≥ " : ""}${short(tick)}`]),
  };
}

/**
 * @param {number} tick
 * @returns {string} which leaves room for the next one
 */
function short(tick) {
  return tick < 1e-3 ? tenTo(Math.round(Math.log10(tick))) : figure(tick);
}

/** @returns {Measure} */
function rungs() {
  const [alias, residual, own] = ["--c-alias", "--c-residual", "--c-own"].map(token);
  const positions = { alias: 0, residual: 0.5, own: 1 };
  return {
    name: "rung",
    about: "alias: the donor's; residual: that and a compressed difference; own: kept whole.",
    position: (cell) => positions[rungClass(cell.rung)],
    scale: [
      [0, alias], [1 / 3, alias], [1 / 3, residual], [2 / 3, residual], [2 / 3, own], [1, own],
    ],
    ticks: [[1 / 6, "alias"], [0.5, "residual"], [5 / 6, "own"]],
  };
}

/**
 * @param {Iterable<Cell>} cells
 * @returns {Measure}
 */
function sizes(cells) {
  let largest = 1;
  for (const cell of cells) largest = Math.max(largest, cell.unique_bytes ?? 0);
  return {
    name: "bytes",
    about: "What the variant holds of a block beside what it reads from its donor.",
    position: (cell) => (cell.unique_bytes === null || cell.unique_bytes === undefined
      ? null : cell.unique_bytes / largest),
    scale: distanceScale(),
    ticks: [[0, "0"], [0.5, bytes(largest / 2)], [1, bytes(largest)]],
  };
}
