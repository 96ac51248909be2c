/** What the cells of a model's row say. Each is drawn anew where what it shows has changed. */
import { attribute, fill, h } from "./dom.js";
import { beside, bytes, figure, percent } from "./format.js";

const TONES = { ready: "good", onboarding: "plain", unloaded: "quiet", failed: "bad" };
const RUNGS = /** @type {const} */ (["alias", "residual", "own"]);

/**
 * @param {HTMLElement} element
 * @param {import("./types.js").Model} model
 */
export function drawName(element, model) {
  const about = [
    model.donor === null ? "donor" : `variant of ${model.donor}`,
    model.alias === null ? null : `also ${model.alias}`,
    model.pinned ? "pinned" : null,
  ];
  const text = about.filter((part) => part !== null).join(" · ");
  attribute(element, "title", ownFamily(model));
  redo(element, `${model.id}\n${text}`, () => [
    h("span", { class: "name" }, model.id),
    h("span", { class: "under" }, text),
  ]);
}

/**
 * @param {{donor?: string|null, donor_choice?: import("./types.js").DonorChoice|null}} found a model, or
 *   what a job came to
 * @returns {string|null} why it has a family of its own; null: it has not, or no donor was looked for
 */
export function ownFamily({ donor, donor_choice: choice }) {
  return (donor ?? null) === null && choice?.donor === null ? choice.reason : null;
}

/**
 * @param {HTMLElement} element
 * @param {import("./types.js").Model} model
 * @param {import("./store.js").Store} store
 */
export function drawState(element, model, store) {
  const load = store.status?.models[model.id];
  const rate = store.rates.models.get(model.id) ?? 0;
  const busy = load !== undefined && load.running + load.waiting > 0;
  const work = busy ? `${load.running} running, ${load.waiting} waiting · ${figure(rate)} tok/s` : "";
  redo(element, JSON.stringify([model.state, model.error?.message, work]), () => [
    h("span", { class: "chip", dataset: { tone: TONES[model.state] } }, model.state),
    work !== "" && h("span", { class: "under" }, work),
    model.error !== null && h("span", { class: "under bad" }, model.error.message),
  ]);
}

/**
 * @param {HTMLElement} element
 * @param {import("./types.js").Model} model
 */
export function drawOwn(element, model) {
  const held = model.bytes;
  redo(element, JSON.stringify(held), () => {
    if (held === null) return ["–"];
    const ratio = held.logical === 0 ? 0 : held.unique / held.logical;
    const bar = h("span", { class: "share", "aria-hidden": "true" }, h("span"));
    /** @type {HTMLElement} */ (bar.firstElementChild).style.width = `${100 * Math.min(ratio, 1)}%`;
    const saved = held.saved > 0 ? `saves ${percent(held.saved / held.logical)}` : "held whole";
    return [
      h("span", { class: "line" }, h("b", {}, bytes(held.unique)), ` of ${bytes(held.logical)}`),
      bar,
      h("span", { class: "under" }, saved),
    ];
  });
}

/**
 * @param {HTMLElement} element
 * @param {import("./types.js").Model} model
 */
export function drawPrice(element, model) {
  const { plan } = model;
  redo(element, JSON.stringify([plan?.price, plan?.budget_kl, plan?.price_source]), () => {
    if (!plan?.price) return [h("span", { class: "faint" }, model.donor === null ? "–" : "not measured")];
    const { price, budget_kl: budget } = plan;
    const over = budget !== null && price.kl_upper > budget;
    const mean = `mean ${figure(price.kl)}`;
    const claimed = plan.price_source === "claimed" ? "claimed · " : "";
    return [
      h(
        "span",
        { class: over ? "line bad" : "line", title: "The upper end of its interval, which the budget is held against" },
        "≤ ",
        h("b", {}, beside(price.kl_upper, budget)),
        budget === null ? "" : ` of ${figure(budget)}`,
      ),
      over && h("span", { class: "under bad" }, "over budget"),
      h("span", { class: "under" }, `${claimed}${mean} · agrees on ${percent(price.top1, 1)} of tokens`),
    ];
  });
}

/**
 * @param {HTMLElement} element
 * @param {import("./types.js").Model} model
 */
export function drawBlocks(element, model) {
  redo(element, JSON.stringify(model.blocks), () => {
    const { blocks } = model;
    if (blocks === null) return ["–"];
    return RUNGS.filter((rung) => blocks[rung] > 0).map((rung) =>
      h("span", { class: "rung", dataset: { rung } }, `${blocks[rung]} ${rung}`),
    );
  });
}

/**
 * Fills an element anew where what it shows has changed.
 *
 * @param {HTMLElement} element
 * @param {string|undefined} shown
 * @param {() => import("./dom.js").Child[]} draw
 */
function redo(element, shown, draw) {
  if (drawn.get(element) === shown) return;
  drawn.set(element, shown);
  fill(element, draw());
}

/** @type {WeakMap<Element, string|undefined>} what each cell shows */
const drawn = new WeakMap();
