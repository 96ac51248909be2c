/** Axes, their ticks, and texts in charts. */
import { token } from "./palette.js";

export const FONT_SIZE = 12; // pixels

/**
 * @param {Record<string, unknown>} [rest]
 * @returns {Record<string, unknown>} an axis that cannot be dragged
 */
export function axis(rest = {}) {
  return {
    fixedrange: true,
    zeroline: false,
    gridcolor: token("--grid"),
    linecolor: token("--line"),
    tickcolor: token("--line"),
    ...rest,
  };
}

/**
 * @param {string} text
 * @returns {Record<string, unknown>} the title of an axis
 */
export function title(text) {
  return { text: plain(text), standoff: 6, font: { size: FONT_SIZE } };
}

/**
 * Plotly reads some markup in texts; names come from outside.
 *
 * @param {string} text
 * @returns {string} which is shown as it stands
 */
export function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

/**
 * @param {number} power
 * @returns {string} ten to it, such as "10⁻⁶"
 */
export function tenTo(power) {
  const digits = [...String(Math.abs(power))].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(digit)]);
  return `10${power < 0 ? "⁻" : ""}${digits.join("")}`;
}

/**
 * @param {string[]} lines
 * @returns {string} a label of several lines; in bold would take inline styles
 */
export function label(lines) {
  return lines.map(plain).join("<br>");
}

/**
 * @param {string} id of a model
 * @param {number} room in pixels
 * @returns {string} what fits of it: its last part, and less of that
 */
export function shortName(id, room) {
  const last = lastPart(id);
  for (const whole of [id, last]) if (widthOf(whole) <= room) return whole;
  let letters = last.length;
  while (letters > 4 && widthOf(`${last.slice(0, letters)}…`) > room) letters -= 1;
  return `${last.slice(0, letters)}…`;
}

/**
 * @param {string} id of a model
 * @returns {string} without whose it is
 */
export function lastPart(id) {
  return id.slice(id.lastIndexOf("/") + 1);
}

/**
 * @param {string[]} names that stand beside an axis
 * @param {number} most in pixels
 * @returns {number} what they need, a mark before one of them and the axis' own distance included
 */
export function roomFor(names, most) {
  return Math.min(Math.max(...names.map(widthOf), 0) + 26, most);
}

/** @type {CanvasRenderingContext2D|null} */
let ruler = null;

/**
 * @param {string} text
 * @returns {number} in pixels, as charts write it
 */
export function widthOf(text) {
  ruler ??= document.createElement("canvas").getContext("2d");
  if (ruler === null) return 7.5 * text.length;
  ruler.font = `${FONT_SIZE}px ${token("--font")}`;
  return ruler.measureText(text).width;
}

/**
 * Ticks of an axis of bytes, at round numbers of their unit.
 *
 * @param {number} largest in bytes
 * @param {number} [about] how many
 * @returns {{tickvals: number[], ticktext: string[]}}
 */
export function byteTicks(largest, about = 5) {
  if (largest <= 0) return { tickvals: [0], ticktext: ["0"] };
  const power = Math.min(Math.floor(Math.log2(largest) / 10), 4);
  const unit = 2 ** (10 * power);
  const rough = largest / unit / about;
  const tens = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((part) => part * tens).find((part) => part >= rough) ?? rough;
  const name = ["B", "KiB", "MiB", "GiB", "TiB"][power];
  const tickvals = [];
  for (let at = 0; at * step * unit <= largest * 1.0001; at += 1) tickvals.push(at * step * unit);
  return {
    tickvals,
    ticktext: tickvals.map((value) =>
      value === 0 ? "0" : `${Number((value / unit).toPrecision(6))} ${name}`,
    ),
  };
}
