/** The axis of bytes of a chart of plans: in powers of two where a step of a round number hides most. */
import { axis, byteTicks, title } from "./axes.js";
import { bytes } from "./format.js";

const MOST = 10; // times the least, above which it is logarithmic
const STEPS = [1, 2, 5, 10]; // powers of two between two ticks

/**
 * @typedef {object} ByteAxis
 * @property {Record<string, unknown>} xaxis
 * @property {[number, number]} within the sizes that there is room for
 * @property {(size: number) => number} at where notes on a size stand, in the axis' own numbers
 * @property {(size: number) => boolean} isRight whether a note has more room to its left
 */

/**
 * @param {number[]} sizes that are to be seen
 * @param {number} about how many ticks
 * @returns {ByteAxis}
 */
export function byteAxis(sizes, about) {
  const [least, largest] = [Math.min(...sizes), Math.max(...sizes)];
  const name = title("bytes of its own");
  if (least * MOST >= largest || least <= 0) {
    const end = largest * 1.06;
    const xaxis = axis({ title: name, range: [-0.02 * largest, end], ...byteTicks(end, about) });
    return { xaxis, within: [0, end], at: (size) => size, isRight: (size) => size > 0.7 * largest };
  }
  const spare = 0.06 * Math.log10(largest / least);
  const range = [Math.log10(least) - spare, Math.log10(largest) + spare];
  const within = /** @type {[number, number]} */ (range.map((power) => 10 ** power));
  return { xaxis: axis({ title: name, type: "log", range, ...powers(within, about) }), within,
    at: Math.log10, isRight: (size) => size > Math.sqrt(least * largest) };
}

/**
 * @param {[number, number]} within
 * @param {number} about how many
 */
function powers([least, largest], about) {
  const [first, last] = [Math.ceil(Math.log2(least)), Math.floor(Math.log2(largest))];
  const step = STEPS.find((one) => (last - first) / one < about) ?? 10;
  const tickvals = [];
  for (let power = first; power <= last; power += step) tickvals.push(2 ** power);
  return { tickvals, ticktext: tickvals.map((size) => bytes(size).replace(".0 ", " ")) };
}
