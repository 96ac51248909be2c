/**
 * The chart of bytes against KL: plans of one variant, its budget, and where other variants are.
 *
 * @typedef {import("./types.js").Model} Model
 * @typedef {import("./types.js").PricedPlan} PricedPlan
 */
import { axis, label, tenTo, title } from "./axes.js";
import { byteAxis } from "./byte_axis.js";
import { bytes, figure } from "./format.js";
import { modelColour, token } from "./palette.js";

const MARGIN = { l: 74, r: 20, t: 14, b: 42 };
const LEAST = 1e-7; // nats, drawn as 0 is
const ROOM_OF_NOTE = 26; // pixels above a point

/**
 * @param {object} shown
 * @param {Model} shown.model
 * @param {PricedPlan[]} shown.plans of the model, the smallest first
 * @param {Model[]} shown.others whose own plans are shown as rings
 * @param {(plan: PricedPlan) => string[]} shown.describe
 * @returns {import("./charts.js").Make}
 */
export function prices({ model, plans, others, describe }) {
  return (width) => {
    const priced = others.filter((other) => other.plan?.price && other.bytes);
    const budget = model.plan?.budget_kl ?? null;
    const floor = lowest([...plans.map((plan) => plan.kl), budget ?? 1]);
    const above = (/** @type {number} */ kl) => Math.max(kl, floor);
    const best = efficient(plans);
    const chosen = plans.filter((plan) => plan.chosen);
    const highest = Math.max(...plans.map((plan) => plan.kl_upper), budget ?? 0, 10 * floor);
    const sizes = plans.map((plan) => plan.unique_bytes);
    const rest = priced.map((other) => other.bytes?.unique ?? 0);
    const along = byteAxis([...sizes, ...rest.filter((size) => size <= Math.max(...sizes))],
      width < 560 ? 3 : 7);
    const height = width < 560 ? 300 : 360;
    const range = [Math.log10(floor) - 0.15, Math.log10(highest * 2)];
    const decade = (height - MARGIN.t - MARGIN.b) / (range[1] - range[0]); // in pixels
    const limit = budget === null ? null : Math.log10(above(budget));
    return {
      traces: [
        points(plans, best, above, describe),
        stairs(best, above),
        rings(priced, above, along.within),
        mark(chosen, above),
      ],
      layout: {
        height,
        margin: MARGIN,
        shapes: budget === null ? [] : beyond(above(budget), highest * 2),
        annotations: [...(limit === null ? [] : [budgetNote(budget, limit)]),
          ...chosen.map((plan) => {
            const y = Math.log10(above(plan.kl));
            const x = along.at(plan.unique_bytes);
            const isRight = along.isRight(plan.unique_bytes);
            return chosenNote(plan, { x, y, isRight, isBelow: isJustBelow(limit, y, decade) });
          })],
        xaxis: along.xaxis,
        yaxis: axis({ title: title("KL, nats per token"), type: "log", range,
          ...decades(floor, highest * 2) }),
      },
    };
  };
}

/**
 * @param {PricedPlan[]} plans
 * @returns {PricedPlan[]} those to which no other is preferable in both bytes and KL
 */
export function efficient(plans) {
  const best = [];
  let lowest = Infinity;
  for (const plan of [...plans].sort((a, b) => a.unique_bytes - b.unique_bytes || a.kl - b.kl)) {
    if (plan.kl < lowest) best.push(plan);
    lowest = Math.min(lowest, plan.kl);
  }
  return best;
}

/** @typedef {(kl: number) => number} Above which keeps what is 0 on a logarithmic axis */

/**
 * @param {PricedPlan[]} plans
 * @param {PricedPlan[]} best
 * @param {Above} above
 * @param {(plan: PricedPlan) => string[]} describe
 */
function points(plans, best, above, describe) {
  const among = new Set(best);
  const colours = plans.map((plan) => token(among.has(plan) ? "--accent" : "--c-other"));
  return {
    type: "scatter",
    mode: "markers",
    x: plans.map((plan) => plan.unique_bytes),
    y: plans.map((plan) => above(plan.kl)),
    error_y: bars(plans, above, { thickness: 1, width: 0, color: token("--c-other") }),
    marker: { size: 8, color: colours, line: { color: token("--surface"), width: 1 } },
    hoverinfo: "text",
    hovertext: plans.map((plan) => label(describe(plan))),
  };
}

/**
 * @param {PricedPlan[]} plans
 * @param {Above} above
 * @param {{thickness: number, width: number, color: string}} look
 * @returns {object} bars up to where the prices' intervals end
 */
function bars(plans, above, look) {
  return {
    type: "data", symmetric: false, ...look,
    array: plans.map((plan) => Math.max(plan.kl_upper - above(plan.kl), 0)),
    arrayminus: plans.map(() => 0),
  };
}

/**
 * @param {PricedPlan[]} best
 * @param {Above} above
 */
function stairs(best, above) {
  return {
    type: "scatter", mode: "lines", hoverinfo: "skip",
    x: best.map((plan) => plan.unique_bytes),
    y: best.map((plan) => above(plan.kl)),
    line: { shape: "hv", color: token("--accent"), width: 1.5 },
  };
}

/**
 * @param {Model[]} others
 * @param {Above} above
 * @param {[number, number]} within the sizes that there is room for
 */
function rings(others, above, [least, most]) {
  const isHere = (/** @type {number} */ size) => size >= least && size <= most;
  const here = others.filter((other) => isHere(other.bytes?.unique ?? 0));
  return {
    type: "scatter", mode: "markers", hoverinfo: "text",
    x: here.map((other) => other.bytes?.unique),
    y: here.map((other) => above(other.plan?.price?.kl ?? 0)),
    customdata: here.map((other) => other.id),
    marker: { size: 11, symbol: "circle-open", color: here.map((other) => modelColour(other).color),
      line: { width: 2 } },
    hovertext: here.map((other) => label([`${other.id} as it is served`,
      `${bytes(other.bytes?.unique)} of its own`,
      `KL ${figure(other.plan?.price?.kl)} nats per token`,
      `priced against its own budget, ${figure(other.plan?.budget_kl)}`])),
  };
}

/**
 * @param {PricedPlan[]} chosen none or one
 * @param {Above} above
 */
function mark(chosen, above) {
  return {
    type: "scatter", mode: "markers", hoverinfo: "skip",
    x: chosen.map((plan) => plan.unique_bytes),
    y: chosen.map((plan) => above(plan.kl)),
    // With an end as wide as the diamond, in which a short bar would not be seen.
    error_y: bars(chosen, above, { thickness: 2, width: 8, color: token("--text") }),
    marker: { size: 17, symbol: "diamond-open", color: token("--text"), line: { width: 2 } },
  };
}

/**
 * @param {number} budget
 * @param {number} highest
 */
function beyond(budget, highest) {
  const across = { xref: "paper", x0: 0, x1: 1, layer: "below" };
  return [
    { ...across, type: "rect", y0: budget, y1: highest, line: { width: 0 },
      fillcolor: token("--bad-soft"), opacity: 0.6 },
    { ...across, type: "line", y0: budget, y1: budget,
      line: { color: token("--bad"), width: 1.5, dash: "dash" } },
  ];
}

/**
 * @param {number|null} budget
 * @param {number} y
 */
function budgetNote(budget, y) {
  return { xref: "paper", x: 1, xanchor: "right", y, yanchor: "bottom", showarrow: false,
    text: `budget ${figure(budget)}`, font: { color: token("--bad") } };
}

/**
 * @param {number|null} limit where the budget's line is, in decades
 * @param {number} y of a point
 * @param {number} decade in pixels
 * @returns {boolean} whether the line would go through what stands above the point
 */
export function isJustBelow(limit, y, decade) {
  return limit !== null && limit >= y && (limit - y) * decade < ROOM_OF_NOTE;
}

/**
 * @param {PricedPlan} chosen
 * @param {{x: number, y: number, isRight: boolean, isBelow: boolean}} place of its point; whether
 *   that is near the right end, and whether the note stands below it
 */
function chosenNote(chosen, { x, y, isRight, isBelow }) {
  return { x, y, showarrow: false, yshift: isBelow ? -14 : 12,
    xanchor: isRight ? "right" : "left", xshift: isRight ? -14 : 14,
    text: `chosen, ${bytes(chosen.unique_bytes)}`, font: { color: token("--text") } };
}

/**
 * @param {number[]} values
 * @returns {number} a power of ten below all that are not 0, where 0 is drawn
 */
export function lowest(values) {
  const positive = values.filter((value) => value > 0);
  if (positive.length === 0) return LEAST;
  return 10 ** Math.floor(Math.log10(Math.max(Math.min(...positive), LEAST)) - 0.3);
}

/**
 * @param {number} floor
 * @param {number} highest
 */
function decades(floor, highest) {
  const tickvals = [];
  const first = Math.round(Math.log10(floor));
  for (let power = first; 10 ** power <= highest; power += 1) tickvals.push(10 ** power);
  return { tickvals, ticktext: tickvals.map((value, at) => {
    const text = value < 1e-3 ? tenTo(first + at) : figure(value);
    return at === 0 ? `≤ ${text}` : text;
  }) };
}
