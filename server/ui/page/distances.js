/** The table of how far each variant lies from its donor; choosing one shows it in the charts. */
import { choose } from "./choice.js";
import { h } from "./dom.js";
import { figure } from "./format.js";
import { cosine, rungClass } from "./measures.js";

export const TITLE = "How far each variant lies from its donor";

const REGIONS = { aligned: "good", boundary: "warn", outside: "bad" };

/**
 * @param {HTMLElement} rows kept up to date by `fillDistances`
 * @returns {HTMLElement}
 */
export function distanceTable(rows) {
  const headers = ["Variant", "Region", "Mean ε", "Mean cos", "Farthest block", "Bits per weight"];
  return h("table", { class: "numbers" },
    h("caption", { class: "unseen" }, TITLE),
    h("thead", {}, h("tr", {}, headers.map((name) => h("th", { scope: "col" }, name)))),
    rows);
}

/** @param {string} id of a variant */
export function distanceRow(id) {
  const name = h("button", { type: "button", class: "link", on: { click: () => choose(id) } }, id);
  return h("tr", {}, h("th", { scope: "row" }, name));
}

/**
 * Writes all but the name anew, which may have the focus.
 *
 * @param {HTMLElement} row
 * @param {import("./types.js").Model} model
 * @param {import("./store.js").Store} store
 */
export function fillDistances(row, { id, plan }, store) {
  const region = plan?.region ?? null;
  const chip = region === null ? "–"
    : h("span", { class: "chip", dataset: { tone: REGIONS[region] } }, region);
  for (const cell of [...row.children].slice(1)) cell.remove();
  row.append(h("td", {}, chip),
    h("td", {}, figure(plan?.mean_epsilon)), h("td", {}, cosine(plan?.mean_cos)),
    h("td", {}, farthest(store.details.get(id)?.blocks ?? [])),
    h("td", {}, plan?.bits_per_weight.toFixed(2) ?? figure(null)));
}

/**
 * @param {import("./types.js").Block[]} blocks
 * @returns {string}
 */
function farthest(blocks) {
  const known = blocks.filter((block) => block.epsilon !== null);
  if (known.length === 0) return "–";
  const far = known.reduce((a, b) => ((a.epsilon ?? 0) >= (b.epsilon ?? 0) ? a : b));
  return `${far.index} (ε ${figure(far.epsilon)}, ${rungClass(far.rung)})`;
}
