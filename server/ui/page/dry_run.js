/** What a dry run found: what would be shared, what it would cost, and whether there is room. */
import { fill, h } from "./dom.js";
import { bytes, figure, nats, percent } from "./format.js";
import { cosine } from "./measures.js";

/**
 * @param {HTMLElement} element
 * @param {any} plan as POST /models/plan answers
 */
export function drawDryRun(element, plan) {
  const rungs = Object.entries(blocksByRung(plan.blocks)).map(([rung, count]) => `${count} ${rung}`);
  fill(
    element,
    h("h3", {}, "Dry run"),
    h("p", { class: plan.fits ? "verdict good" : "verdict bad" }, verdict(plan)),
    h(
      "dl",
      { class: "facts" },
      fact("Donor", plan.donor ?? "none: it would begin a family"),
      fact("Own bytes", own(plan)),
      fact("Price", price(plan)),
      fact("Blocks", rungs.length > 0 ? rungs.join(", ") : null),
      fact("Region", region(plan)),
      fact("Needs", `${bytes(plan.needed_bytes.total)} of ${bytes(plan.free_bytes)} free`),
    ),
  );
}

/** @param {any} plan */
function verdict(plan) {
  if (!plan.fits) return "It does not fit, even if everything idle were evicted.";
  if (plan.within_budget === false) return "It fits, but it would cost more than its budget.";
  if (plan.would_evict.length === 0) return "It fits.";
  return `It fits once ${plan.would_evict.join(", ")} ${plan.would_evict.length === 1 ? "is" : "are"} evicted.`;
}

/** @param {any} plan */
function own({ bytes: held }) {
  if (!held) return null;
  const saved = 1 - held.unique / held.logical;
  const verb = saved > 0 ? `saves ${percent(saved)}` : "held whole";
  return `${bytes(held.unique)} of ${bytes(held.logical)}: ${verb}`;
}

/** @param {any} plan */
function price({ price: found, budget_kl: budget, price_source: source }) {
  if (!found) return "not measured";
  const limit = budget === null ? "" : ` of ${figure(budget, 2)}`;
  const claimed = source === "claimed" ? " (claimed)" : "";
  return `${nats(found.kl)}${limit} nats per token${claimed}, agrees on ${percent(found.top1, 1)}`;
}

/** @param {any} plan */
function region(plan) {
  if (!plan.region) return null;
  return `${plan.region}: cos ${cosine(plan.mean_cos)}, ε ${figure(plan.mean_epsilon, 3)}`;
}

/**
 * @param {{rung: string}[]|null} blocks
 * @returns {Record<string, number>}
 */
function blocksByRung(blocks) {
  /** @type {Record<string, number>} */
  const counts = {};
  for (const { rung } of blocks ?? []) counts[rung] = (counts[rung] ?? 0) + 1;
  return counts;
}

/**
 * @param {string} name
 * @param {string|null} value null: unknown
 */
function fact(name, value) {
  return value === null ? null : h("div", {}, h("dt", {}, name), h("dd", {}, value));
}
