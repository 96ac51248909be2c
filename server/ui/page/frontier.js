/** The section of prices: what each plan of a variant would hold, and what it would cost it. */
import { choose, Chooser, onChoice } from "./choice.js";
import { walkable } from "./cursor.js";
import { fill, h, say } from "./dom.js";
import { Figure, nothing } from "./figure.js";
import { bytes, counted, figure, percent } from "./format.js";
import { byFamily } from "./memory.js";
import { giveColours, modelColour } from "./palette.js";
import { efficient, prices } from "./prices.js";
import { redraw } from "./redraw.js";

/**
 * @typedef {import("./types.js").Model} Model
 * @typedef {import("./types.js").PricedPlan} PricedPlan
 */

const NAMED = 8; // more variants than this are named when they are pointed at
const ABOUT = "Lower is truer to the variant, further left is smaller. The bars end where the"
  + " price's interval does, and that end is held against the budget.";
const ABOUT_RINGS = " Rings are other variants as they are served, each priced against a budget of"
  + " its own: the red zone is this variant's alone.";

/**
 * @param {HTMLElement} section
 * @param {import("./store.js").Store} store
 */
export function mount(section, store) {
  /** @type {PricedPlan[]} */
  let plans = [];
  const chooser = new Chooser("Variant");
  const facts = h("dl", { class: "priced", hidden: true });
  const chart = new Figure({
    title: "What every priced plan holds, and what it costs",
    about: ABOUT,
    keys: "Left and right go from plan to plan.",
    onClick: (point) => { if (typeof point.customdata === "string") choose(point.customdata); },
  });
  const empty = nothing("No variant has been priced yet. A variant that is onboarded with the policy"
    + " budget or bytes is: the server tries several plans and measures what each costs it.");
  section.append(empty, h("div", { class: "tools" }, chooser.element, facts), chart.element);

  const ask = redraw(section, draw, "models", "details", "theme");
  onChoice(ask);
  walkable(chart.walked, chart.readout, {
    size: () => ({ rows: 1, columns: plans.length }),
    show: (place) =>
      void chart.chart.point(place && { curveNumber: 0, pointNumber: place.column }),
    describe: ({ column }) => described(plans[column]).join(", "),
  });

  function draw() {
    giveColours(store.models.values());
    const models = tuned(store);
    const id = chooser.offer(models.map((model) => model.id));
    const model = models.find((one) => one.id === id);
    empty.hidden = model !== undefined || !store.told.has("details");
    for (const part of [chart.element, facts]) part.hidden = model === undefined;
    if (model === undefined) return;
    plans = plansOf(model, store);
    drawFacts(facts, model);
    const others = models.filter((one) => one !== model);
    say(chart.note, others.length > 0 ? ABOUT + ABOUT_RINGS : ABOUT);
    chart.show({
      label: summary(model, plans),
      make: prices({ model, plans, others, describe: described }),
      legend: [
        { token: "--accent", name: `no plan of ${model.id} is smaller and truer` },
        { token: "--c-other", name: "its other plans" },
        ...rings(others),
      ],
      table: () => table(plans),
    });
  }
}

/**
 * @param {import("./store.js").Store} store
 * @returns {Model[]} the variants whose priced plans are known
 */
function tuned(store) {
  return [...store.models.values()].sort(byFamily).filter((model) =>
    model.donor !== null && (store.details.get(model.id)?.frontier?.length ?? 0) > 0);
}

/**
 * @param {Model[]} others
 * @returns {import("./figure.js").Key[]} what their rings stand for
 */
function rings(others) {
  if (others.length > NAMED) {
    return [{ token: "--c-other", pattern: "ring", name: `${others.length} other variants` }];
  }
  return others.map((other) => {
    const budget = other.plan?.budget_kl ?? null;
    const own = budget === null ? "" : ` (budget ${figure(budget)})`;
    return { token: modelColour(other).token, pattern: "ring", name: `${other.id}${own}` };
  });
}

/**
 * @param {Model} model
 * @param {import("./store.js").Store} store
 * @returns {PricedPlan[]} the smallest first
 */
function plansOf(model, store) {
  const plans = store.details.get(model.id)?.frontier ?? [];
  return [...plans].sort((a, b) => a.unique_bytes - b.unique_bytes);
}

/**
 * @param {HTMLElement} place
 * @param {Model} model
 */
function drawFacts(place, { plan, bytes: size }) {
  const price = plan?.price ?? null;
  const shown = [
    ["Its own bytes", bytes(size?.unique)],
    ["Of a separate copy", percent(size ? size.unique / size.logical : null, 1)],
    ["KL, nats per token", figure(price?.kl)],
    ["At most", figure(price?.kl_upper)],
    ["Budget", figure(plan?.budget_kl)],
    ["Same first choice", percent(price?.top1, 1)],
    ["Perplexity", price === null ? figure(null) : `× ${price.ppl_ratio.toFixed(3)}`],
  ];
  fill(place, shown.map(([name, value]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/**
 * @param {PricedPlan} plan
 * @returns {string[]}
 */
function described(plan) {
  return [
    plan.chosen ? "The chosen plan" : "A priced plan",
    `${bytes(plan.unique_bytes)} of its own`,
    `KL ${figure(plan.kl)}, at most ${figure(plan.kl_upper)} nats per token`,
  ];
}

/**
 * @param {Model} model
 * @param {PricedPlan[]} plans
 * @returns {string}
 */
function summary(model, plans) {
  const chosen = plans.find((plan) => plan.chosen);
  const budget = model.plan?.budget_kl ?? null;
  const words = [`${counted(plans.length, "priced plan")} of ${model.id}`];
  if (chosen) words.push(`chosen: ${described(chosen).slice(1).join(", ")}`);
  if (budget !== null) words.push(`budget ${figure(budget)} nats per token`);
  return words.join("; ");
}

/**
 * @param {PricedPlan[]} plans
 * @returns {import("./figure.js").Table}
 */
function table(plans) {
  const best = new Set(efficient(plans));
  return {
    headers: ["Plan", "Own bytes", "KL, nats", "KL at most", "Chosen", "None smaller and truer"],
    rows: plans.map((plan, index) => [index + 1, bytes(plan.unique_bytes), figure(plan.kl),
      figure(plan.kl_upper), plan.chosen ? "yes" : "", best.has(plan) ? "yes" : ""]),
  };
}
