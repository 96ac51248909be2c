/**
 * Charts of what fine-tunes have in common: shares against their null, curves along the layers, and
 * cosines between them.
 *
 * @typedef {import("./types.js").SharePair} SharePair
 */
import { axis, label, lastPart, plain, roomFor, shortName, title, widthOf } from "./axes.js";
import { figure, percent } from "./format.js";
import { token } from "./palette.js";

const ROW = 27; // pixels
const AXIS = 40;
const ROOM_OF_NUMBER = 36;

/**
 * A bar for the share of each component, and a mark where its null ends.
 *
 * @param {object} shown
 * @param {SharePair[]} shown.rows
 * @param {number|null} shown.at the row where the keyboard is
 * @param {(row: SharePair) => string[]} shown.describe
 * @returns {import("./charts.js").Make}
 */
export function shareBars({ rows, at, describe }) {
  return () => {
    const y = rows.map((_, index) => index);
    const hovertext = rows.map((row) => label(describe(row)));
    const shares = rows.map((row) => percent(row.share, 1));
    const end = roomFor(shares, 72);
    return {
      traces: [
        {
          type: "bar",
          orientation: "h",
          x: rows.map((row) => row.share),
          y,
          marker: {
            color: rows.map((row) => token(row.share > row.null95 ? "--accent" : "--c-other")),
            line: { color: rows.map((_, index) => token(index === at ? "--text" : "--surface")),
              width: rows.map((_, index) => (index === at ? 2 : 0)) },
          },
          error_x: whiskers(rows),
          hoverinfo: "text",
          hovertext,
        },
        {
          type: "scatter",
          mode: "markers",
          x: rows.map((row) => row.null95),
          y,
          marker: { symbol: "line-ns", size: ROW - 8,
            line: { color: token("--text"), width: 2.5 } },
          hoverinfo: "text",
          hovertext,
        },
      ],
      layout: {
        height: rows.length * ROW + AXIS + 8,
        bargap: 0.38,
        margin: { l: 84, r: end, t: 4, b: AXIS },
        annotations: rows.map((row, index) => ({ x: 1, xref: "paper", xanchor: "left", xshift: 6,
          y: index, yref: "y", showarrow: false, text: shares[index] })),
        xaxis: axis({ range: [0, 1], tickvals: [0, 0.25, 0.5, 0.75, 1],
          ticktext: ["0", "25 %", "50 %", "75 %", "100 %"], title: title("share of the variance") }),
        yaxis: axis({ tickvals: y, ticktext: rows.map((row) => row.name), showgrid: false, ticks: "",
          range: [rows.length - 0.5, -0.5] }),
      },
    };
  };
}

/**
 * @param {SharePair[]} rows
 * @returns {Record<string, unknown>} from the lower to the upper end of each interval
 */
function whiskers(rows) {
  return {
    type: "data",
    symmetric: false,
    array: rows.map(({ share, interval }) => Math.max((interval?.[1] ?? share) - share, 0)),
    arrayminus: rows.map(({ share, interval }) => Math.max(share - (interval?.[0] ?? share), 0)),
    color: token("--soft"),
    thickness: 1,
    width: 3,
  };
}

/**
 * A number along the layers.
 *
 * @param {object} shown
 * @param {(number|null)[]} shown.values by layer; null: a layer without it
 * @param {string} shown.unit on the axis
 * @param {string} shown.color of the theme
 * @param {[number, number]} [shown.range] of the axis; unless said, what holds all values and 0
 * @param {number|null} shown.at the layer where the keyboard is
 * @param {(layer: number) => string[]} shown.describe
 * @returns {import("./charts.js").Make}
 */
export function layerCurve({ values, unit, color, range, at, describe }) {
  return () => ({
    traces: [{
      type: "scatter",
      mode: "lines+markers",
      x: values.map((_, layer) => layer),
      y: values,
      line: { color: token(color), width: 2 },
      marker: { color: token(color), size: values.map((_, layer) => (layer === at ? 11 : 6)),
        line: { color: token("--text"), width: values.map((_, layer) => (layer === at ? 2 : 0)) } },
      connectgaps: false,
      hoverinfo: "text",
      hovertext: values.map((_, layer) => label(describe(layer))),
    }],
    layout: {
      height: 230,
      margin: { l: 76, r: 12, t: 8, b: AXIS },
      xaxis: axis({ title: title("layer"), showgrid: false, tickformat: "d",
        range: [-0.5, values.length - 0.5], nticks: Math.min(values.length + 1, 12) }),
      yaxis: axis({ title: title(unit), zeroline: true, zerolinecolor: token("--edge"),
        tickformat: "~g", rangemode: "tozero", ...(range === undefined ? {} : { range }) }),
    },
  });
}

/**
 * Cosines between fine-tunes: 0 has the ground's colour, opposite ones another than like ones.
 *
 * @param {object} shown
 * @param {string[]} shown.names
 * @param {number[][]} shown.matrix
 * @param {import("./cursor.js").Place|null} shown.at where the keyboard is
 * @param {(row: number, column: number) => string[]} shown.describe
 * @returns {import("./charts.js").Make}
 */
export function cosineCells({ names, matrix, at, describe }) {
  return (width) => {
    const left = roomFor(names, Math.min(190, width * 0.34));
    const size = Math.min((width - left - 12) / names.length, 64);
    const height = Math.max(Math.min(size, 40), 17);
    const isWritten = size >= ROOM_OF_NUMBER;
    const fit = names.every((name) => widthOf(name) <= size - 4);
    const columns = fit ? names : names.map(lastPart); // all of them alike
    const places = names.map((_, index) => index);
    return {
      traces: [{
        type: "heatmap",
        z: matrix,
        zmin: -1,
        zmax: 1,
        colorscale: cosineScale(),
        showscale: false,
        xgap: 1.5,
        ygap: 1.5,
        hoverinfo: "text",
        hovertext: matrix.map((row, i) => row.map((_, j) => label(describe(i, j)))),
        text: isWritten ? matrix.map((row) => row.map((value) => figure(value, 2))) : undefined,
        texttemplate: isWritten ? "%{text}" : "",
        textfont: { size: 11 },
      }],
      layout: {
        height: names.length * height + AXIS,
        margin: { l: left, r: width - left - size * names.length, t: 4, b: AXIS - 8 },
        shapes: at === null ? [] : [["--surface", 5], ["--text", 2]].map(([name, stroke]) => ({
          type: "rect", x0: at.column - 0.5, x1: at.column + 0.5, y0: at.row - 0.5, y1: at.row + 0.5,
          line: { color: token(String(name)), width: stroke } })),
        xaxis: axis({ showgrid: false, ticks: "", tickvals: isWritten ? places : [], tickangle: 0,
          ticktext: columns.map((name) => plain(shortName(name, size - 4))) }),
        yaxis: axis({ showgrid: false, ticks: "", range: [names.length - 0.5, -0.5],
          tickvals: places, ticktext: names.map((name) => plain(shortName(name, left - 10))) }),
      },
    };
  };
}

/** @returns {[number, string][]} from opposite (0) over unrelated (0.5) to alike (1) */
export function cosineScale() {
  return [
    [0, token("--c-own")],
    [0.5, token("--e-0")],
    [0.6, token("--e-1")],
    [0.72, token("--e-2")],
    [0.86, token("--e-3")],
    [1, token("--e-4")],
  ];
}
