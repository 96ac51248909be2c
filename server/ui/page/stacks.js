/** The memory section's charts: one bar of weights against another, kinds of rungs, and growth. */
import { axis, byteTicks, label, plain, roomFor, shortName, title } from "./axes.js";
import { bytes, counted, percent } from "./format.js";
import { growth } from "./memory.js";
import { filled, kindToken, modelColour, token } from "./palette.js";

/** @typedef {import("./memory.js").Sized} Sized */

const ROW = { few: 30, many: 19 }; // pixels
const MANY = 16;
const AXIS = 34;
/** @type {Record<string, string>} of kinds, as plotly calls them; those of one colour all differ */
const PATTERNS = {
  int2: "/",
  int3: ".",
  "lowrank+signs": "-",
  "lowrank+int2": "/",
  "lowrank+int3": ".",
  "lowrank+int4": "x",
};

/**
 * Weights with sharing above what separate copies would take, model by model.
 *
 * @param {Sized[]} models
 * @returns {import("./charts.js").Make}
 */
export function weights(models) {
  return (width) => {
    const narrow = width < 560;
    const rows = ["Separate copies", "With sharing"];
    const largest = Math.max(...stackEnds(models));
    const traces = models.map((model) => ({
      type: "bar",
      orientation: "h",
      y: rows,
      x: [model.bytes.logical, model.bytes.unique],
      marker: filled(modelColour(model)),
      hoverinfo: "text",
      hovertext: [
        label([model.id, `${bytes(model.bytes.logical)} as a copy of its own`]),
        label([model.id, `${bytes(model.bytes.unique)} of its own on the device`,
          `${bytes(model.bytes.shared)} read from its donor`]),
      ],
    }));
    return {
      traces,
      layout: {
        height: 2 * 44 + AXIS + 8,
        barmode: "stack",
        bargap: 0.28,
        margin: { l: narrow ? 74 : 112, r: 16, t: 4, b: AXIS },
        xaxis: axis({ range: [0, largest * 1.005], ...byteTicks(largest, narrow ? 3 : 7) }),
        yaxis: axis({ ticktext: narrow ? ["Separate", "Shared"] : rows, tickvals: rows,
          showgrid: false, ticks: "" }),
      },
    };
  };
}

/**
 * What each variant holds to itself, by kind of rung.
 *
 * @param {Sized[]} variants
 * @param {string[]} kinds
 * @returns {import("./charts.js").Make}
 */
export function kinds(variants, kinds) {
  return (width) => {
    const room = roomFor(variants.map((model) => model.id), Math.min(210, width * 0.34));
    const end = width < 480 ? 64 : 132;
    const shown = [...variants].reverse(); // plotly counts from below
    const y = shown.map((_, index) => index);
    const largest = Math.max(...shown.map((model) => model.bytes.unique), 1);
    const traces = kinds.map((kind) => ({
      type: "bar",
      orientation: "h",
      y,
      x: shown.map((model) => model.plan?.rung_bytes[kind] ?? 0),
      marker: filled({ color: token(kindToken(kind)), pattern: kindPattern(kind) }),
      hoverinfo: "text",
      hovertext: shown.map((model) =>
        label([model.id, `${kindName(kind)}: ${bytes(model.plan?.rung_bytes[kind] ?? 0)}`])),
    }));
    const notes = shown.map((model, index) => ({
      x: 1, xref: "paper", xanchor: "left", xshift: 6, y: index, yref: "y", showarrow: false,
      text: width < 480 ? bytes(model.bytes.unique)
        : `${bytes(model.bytes.unique)} · ${share(model)}`,
    }));
    return {
      traces,
      layout: {
        height: (shown.length > MANY ? ROW.many : ROW.few) * shown.length + AXIS + 8,
        barmode: "stack",
        bargap: 0.35,
        annotations: notes,
        margin: { l: room, r: end, t: 4, b: AXIS },
        xaxis: axis({ range: [0, largest], ...byteTicks(largest, width < 480 ? 2 : 4) }),
        yaxis: axis({ tickvals: y,
          ticktext: shown.map((model) => plain(shortName(model.id, room - 10))),
          range: [-0.5, shown.length - 0.5], showgrid: false, ticks: "" }),
      },
    };
  };
}

/**
 * Memory against the number of models, with sharing and without (BS figure 5).
 *
 * @param {Sized[]} family the donor first
 * @param {number} until how many models
 * @returns {import("./charts.js").Make}
 */
export function growthLines(family, until) {
  const points = growth(family, until);
  return (width) => {
    const ticks = byteTicks(Math.max(...points.map((point) => point.separate), 1), 4);
    const there = points.filter((point) => point.isThere);
    const ahead = points.slice(there.length - 1);
    /** @type {["separate"|"shared", string, string][]} */
    const lines = [
      ["separate", "--c-other", "separate copies"],
      ["shared", "--accent", "with sharing"],
    ];
    const traces = lines.flatMap(([key, colour, name]) =>
      [there, ahead].map((part, index) => ({
        type: "scatter",
        mode: index === 0 ? "lines+markers" : "lines",
        x: part.map((point) => point.count),
        y: part.map((point) => point[key]),
        line: { color: token(colour), width: 2, dash: index === 0 ? "solid" : "dot" },
        marker: { size: 6 },
        hoverinfo: "text",
        hovertext: part.map((point) => label([counted(point.count, "model"),
          `${bytes(point[key])} ${name}`, `${percent(1 - point.shared / point.separate)} saved`])),
      })));
    const last = /** @type {typeof points[0]} */ (points.at(-1));
    const ends = lines.map(([key, colour, name]) => ({
      x: last.count, y: last[key], xanchor: "right", yanchor: "bottom", showarrow: false,
      yshift: 3, text: name, font: { color: token(colour === "--accent" ? colour : "--soft") },
    }));
    return {
      traces,
      layout: {
        height: 220,
        annotations: ends,
        margin: { l: 64, r: 12, t: 18, b: 40 },
        xaxis: axis({ title: title("models of the family"), showgrid: false,
          dtick: width < 400 ? Math.ceil(until / 8) : Math.ceil(until / 16) }),
        yaxis: axis({ ...ticks, rangemode: "tozero" }),
      },
    };
  };
}

/**
 * @param {string} kind such as "int4" or "lowrank+signs"
 * @returns {string} in words
 */
export function kindName(kind) {
  if (kind === "own") return "own tensors";
  if (kind === "rows") return "own rows";
  /** @type {Record<string, string>} */
  const words = { lowrank: "low-rank", signs: "sign" };
  const parts = kind.split("+").map((part) => words[part] ?? part.replace(/^int(\d)$/, "$1-bit"));
  return `${parts.join(" + ")} residual`;
}

/**
 * @param {string} kind
 * @returns {string} so that shades of one colour differ in more than their shade
 */
export function kindPattern(kind) {
  return PATTERNS[kind] ?? "";
}

/**
 * @param {Sized[]} models
 * @returns {number[]} where both stacks end
 */
function stackEnds(models) {
  const logical = models.reduce((total, model) => total + model.bytes.logical, 0);
  return [logical, models.reduce((total, model) => total + model.bytes.unique, 0), 1];
}

/**
 * @param {Sized} model
 * @returns {string} how much of a separate copy it holds
 */
function share({ bytes: { unique, logical } }) {
  return percent(unique / logical, unique / logical < 0.0995 ? 1 : 0);
}
