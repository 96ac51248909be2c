/**
 * Rows of blocks as coloured cells. Knows neither what the rows are nor what the colours mean.
 *
 * @typedef {import("./measures.js").Cell} Cell
 * @typedef {{id: string, name: string, note: string, cells: (Cell|null)[]}} Row null: no such cell
 *
 * @typedef {object} Grid
 * @property {Row[]} rows
 * @property {number} columns
 * @property {string} column what a column is
 * @property {import("./measures.js").Measure} measure
 * @property {(cell: Cell, row: Row, column: number) => string[]} describe
 * @property {string} ends what the notes at the rows' ends are
 * @property {HTMLElement} marks what the marks of cells mean
 * @property {string|null} strong id of the row that stands out
 * @property {import("./cursor.js").Place|null} at where the keyboard is
 */
import { axis, label, plain, roomFor, shortName, title, widthOf } from "./axes.js";
import { fill, h } from "./dom.js";
import { rungMark } from "./measures.js";
import { token } from "./palette.js";

const ROOM_OF_MARK = 11; // pixels
const ROOM_OF_TICK = 24;
const STEPS = [1, 2, 4, 5, 10, 20]; // from tick to tick
const WIDEST = 56; // a cell

/**
 * @param {Grid} grid
 * @returns {import("./charts.js").Make}
 */
export function cells(grid) {
  const { rows, columns, column, measure } = grid;
  return (width) => {
    const narrow = width < 560;
    const left = roomFor(rows.map((row) => row.name), Math.min(210, width * 0.36));
    const notes = [grid.ends, ...rows.map((row) => row.note)];
    const end = narrow ? 8 : 16 + Math.max(...notes.map(widthOf));
    const size = Math.min((width - left - end) / Math.max(columns, 1), WIDEST);
    const right = width - left - size * columns;
    const height = rows.length > 24 ? 17 : 25;
    const gap = size < 5 ? 0.5 : 1.5; // at 0 plotly draws in a way that needs inline styles
    const over = (/** @type {(cell: Cell, row: Row, index: number) => unknown} */ make) =>
      rows.map((row) => row.cells.map((cell, index) => cell && make(cell, row, index)));
    const isMarked = size >= ROOM_OF_MARK && measure.name !== "rung";
    grid.marks.hidden = !isMarked;
    return {
      traces: [{
        type: "heatmap",
        z: over((cell) => measure.position(cell)),
        zmin: 0,
        zmax: 1,
        colorscale: measure.scale,
        showscale: false,
        xgap: gap,
        ygap: gap,
        hoverinfo: "text",
        hoverongaps: false,
        hovertext: over((cell, row, index) => label(grid.describe(cell, row, index))),
        text: isMarked ? over(rungMark) : undefined,
        texttemplate: isMarked ? "%{text}" : "",
        textfont: { size: 9 },
      }],
      layout: {
        height: rows.length * height + (narrow ? 44 : 58),
        margin: { l: left, r: right, t: narrow ? 4 : 18, b: 40 },
        shapes: grid.at === null ? [] : outline(grid.at),
        annotations: narrow ? [] : [heading(grid.ends), ...rows.map((row, index) => note(row.note, index))],
        xaxis: axis({ title: title(column), showgrid: false, range: [-0.5, columns - 0.5],
          tick0: 0, dtick: STEPS.find((step) => step * size >= ROOM_OF_TICK) ?? 50 }),
        yaxis: axis({ showgrid: false, ticks: "", range: [rows.length - 0.5, -0.5],
          tickvals: rows.map((_, index) => index),
          ticktext: rows.map((row) => name(row, left - 10, row.id === grid.strong)) }),
      },
    };
  };
}

/** @returns {HTMLElement} what the marks of cells mean; hidden where there is no room for them */
export function markNote() {
  return h("p", { class: "figure-note", hidden: true }, "■ own, ○ residual, unmarked: alias");
}

/**
 * Fills in what the colours mean.
 *
 * @param {HTMLElement} place
 * @param {import("./measures.js").Measure} measure
 */
export function drawScale(place, measure) {
  const bar = h("span", { class: "scale-bar" });
  const stops = measure.scale.map(([at, colour]) => `${colour} ${(100 * at).toFixed(2)}%`);
  bar.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
  const ticks = h("span", { class: "scale-ticks" }, measure.ticks.map(([at, text]) => {
    const tick = h("span", {}, text);
    tick.style.left = `${100 * at}%`;
    if (at === 0) tick.dataset.end = "low";
    if (at === 1) tick.dataset.end = "high";
    return tick;
  }));
  fill(place, h("span", { class: "scale-name" }, measure.name),
    h("span", { class: "scale-body" }, bar, ticks));
}

/**
 * @param {import("./cursor.js").Place} at
 * @returns {object[]} two frames, one of which stands out whatever the cell's colour
 */
function outline({ row, column }) {
  const around = { type: "rect", x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5 };
  return [["--surface", 5], ["--text", 2]].map(([name, width]) =>
    ({ ...around, line: { color: token(String(name)), width } }));
}

/** @param {string} text what the numbers at the rows' ends are */
function heading(text) {
  return { x: 1, xref: "paper", xanchor: "left", xshift: 6, y: 1, yref: "paper", yanchor: "bottom",
    showarrow: false, text, font: { color: token("--faint") } };
}

/**
 * @param {string} text
 * @param {number} row
 */
function note(text, row) {
  return { x: 1, xref: "paper", xanchor: "left", xshift: 6, y: row, yref: "y", showarrow: false,
    text: plain(text) };
}

/**
 * @param {Row} row
 * @param {number} room in pixels
 * @param {boolean} isStrong
 */
function name(row, room, isStrong) {
  return plain(isStrong ? `▸ ${shortName(row.name, room - 14)}` : shortName(row.name, room));
}
