/** The table of models: what each takes, what sharing costs it, and what an operator may do. */
import { actions } from "./actions.js";
import { serverNow } from "./api.js";
import { fill, h, keep, say } from "./dom.js";
import { ago, counted } from "./format.js";
import { drawBlocks, drawName, drawOwn, drawPrice, drawState } from "./model_cells.js";
import { redraw } from "./redraw.js";
import { isAdmin } from "./store.js";

const COLUMNS = ["Model", "State", "Own bytes", "Price, nats per token", "Blocks", "Last used"];
const TICK_MS = 10_000; // how often "last used" is written anew

/**
 * @param {HTMLElement} section
 * @param {import("./store.js").Store} store
 */
export function mount(section, store) {
  const head = h("tr", { role: "row" });
  const body = h("tbody", { role: "rowgroup" });
  const table = h(
    "table",
    { class: "models", role: "table", "aria-labelledby": "models-title", hidden: true },
    h("thead", { role: "rowgroup" }, head),
    body,
  );
  const empty = h("p", { class: "empty", hidden: true });
  const summary = h("p", { class: "aside" });
  section.querySelector(".card-head")?.append(summary);
  section.append(table, empty);

  function draw() {
    const titles = isAdmin() ? [...COLUMNS, "Actions"] : COLUMNS;
    if (head.childElementCount !== titles.length) {
      fill(head, titles.map((title) => h("th", { scope: "col", role: "columnheader" }, title)));
      fill(body);
    }
    table.hidden = store.models.size === 0;
    empty.hidden = store.models.size > 0 || !store.told.has("models");
    say(empty, isAdmin() ? "No model yet. Onboard one below; the first becomes a donor." : "No model yet.");
    say(summary, store.models.size === 0 ? "" : summed([...store.models.values()]));
    const now = serverNow();
    keep(body, sorted(store.models), row, (element, model) => update(element, model, now));
  }

  const ask = redraw(section, draw, "models", "session", "status");
  setInterval(ask, TICK_MS);

  /** @type {WeakMap<Element, {made: Record<string, HTMLElement>, acts: import("./actions.js").Actions|null}>} */
  const cells = new WeakMap();

  /**
   * @param {string} id
   * @returns {HTMLElement}
   */
  function row(id) {
    const made = {
      name: h("th", { scope: "row", role: "rowheader" }),
      state: cell("State"),
      own: cell("Own bytes"),
      price: cell("Price"),
      blocks: cell("Blocks"),
      used: cell("Last used"),
    };
    const element = h("tr", { role: "row", dataset: { model: id } }, Object.values(made));
    const acts = isAdmin() ? actions(id) : null;
    if (acts !== null) element.append(h("td", { role: "cell", class: "acts" }, acts.element));
    cells.set(element, { made, acts });
    return element;
  }

  /**
   * @param {HTMLElement} element
   * @param {import("./types.js").Model} model
   * @param {number} now seconds since the epoch
   */
  function update(element, model, now) {
    const { made, acts } = /** @type {any} */ (cells.get(element));
    acts?.update(model);
    drawName(made.name, model);
    drawState(made.state, model, store);
    drawOwn(made.own, model);
    drawPrice(made.price, model);
    drawBlocks(made.blocks, model);
    say(made.used, ago(model.last_used_at, now));
  }
}

/** @param {string} label shown beside the value where the table is stacked */
function cell(label) {
  return h("td", { role: "cell", dataset: { label } });
}

/**
 * @param {Map<string, import("./types.js").Model>} models
 * @returns {[string, import("./types.js").Model][]} each donor before its variants
 */
function sorted(models) {
  const order = [...models.keys()];
  const rank = (/** @type {import("./types.js").Model} */ model) => {
    const donor = order.indexOf(model.donor ?? model.id);
    return [donor < 0 ? order.length : donor, model.donor === null ? 0 : 1, order.indexOf(model.id)];
  };
  return [...models].sort(([, a], [, b]) => {
    const [x, y] = [rank(a), rank(b)];
    return x[0] - y[0] || x[1] - y[1] || x[2] - y[2];
  });
}

/** @param {import("./types.js").Model[]} models */
function summed(models) {
  const resident = models.filter((model) => model.state === "ready").length;
  return `${counted(models.length, "model")}, ${resident} resident`;
}
