/** Walking through a chart with the keyboard: cell by cell, or point by point. */
import { say } from "./dom.js";

/**
 * @typedef {{row: number, column: number}} Place
 *
 * @typedef {object} Walk
 * @property {() => {rows: number, columns: number}} size
 * @property {(place: Place|null) => void} show marks a place; null: none, as focus has left
 * @property {(place: Place) => string} describe in words
 * @property {(place: Place) => void} [choose] on Enter
 */

/**
 * @param {HTMLElement} host which takes the focus
 * @param {HTMLElement} readout which says where we are
 * @param {Walk} walk
 */
export function walkable(host, readout, walk) {
  /** @type {Place} */
  let place = { row: 0, column: 0 };

  /**
   * Moves there, or as near to it as there is something: what is shown changes meanwhile.
   *
   * @param {Place} wanted
   * @returns {boolean} whether there is anything
   */
  function go(wanted) {
    const { rows, columns } = walk.size();
    if (rows === 0 || columns === 0) return false;
    place = { row: within(wanted.row, rows), column: within(wanted.column, columns) };
    walk.show(place);
    say(readout, walk.describe(place));
    return true;
  }

  host.addEventListener("focus", () => {
    if (host.matches(":focus-visible")) go(place);
  });
  host.addEventListener("blur", () => {
    walk.show(null);
    say(readout, "");
  });
  host.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const next = moved(event.key, place, walk.size());
    if (next !== null) go(next);
    else if (event.key !== "Enter" || !walk.choose) return;
    else if (go(place)) walk.choose(place);
    event.preventDefault();
  });
}

/**
 * @param {string} key
 * @param {Place} place
 * @param {{rows: number, columns: number}} size
 * @returns {Place|null} null: the key moves nothing
 */
function moved(key, { row, column }, { rows, columns }) {
  switch (key) {
    case "ArrowLeft": return { row, column: column - 1 };
    case "ArrowRight": return { row, column: column + 1 };
    case "ArrowUp": return rows > 1 ? { row: row - 1, column } : null;
    case "ArrowDown": return rows > 1 ? { row: row + 1, column } : null;
    case "Home": return { row, column: 0 };
    case "End": return { row, column: columns - 1 };
    default: return null;
  }
}

/**
 * @param {number} value
 * @param {number} count
 * @returns {number} from 0 to below count
 */
function within(value, count) {
  return Math.min(Math.max(value, 0), count - 1);
}
