/** The section of weights: where each variant lies, and one variant's tensors, block by block. */
import { ApiError, modelPath, request } from "./api.js";
import { Chooser, onChoice } from "./choice.js";
import { walkable } from "./cursor.js";
import { distanceRow, distanceTable, fillDistances, TITLE } from "./distances.js";
import { attribute, h, keep, say } from "./dom.js";
import { Figure, nothing } from "./figure.js";
import { figure } from "./format.js";
import { cells, drawScale, markNote } from "./grid.js";
import { cosine, facts, measure } from "./measures.js";
import { byFamily } from "./memory.js";
import { redraw } from "./redraw.js";
import { tensorRows, worstOf } from "./tensors.js";

/**
 * @typedef {import("./types.js").Model} Model
 * @typedef {import("./tensors.js").Tensor} Tensor
 * @typedef {import("./tensors.js").TensorRow} TensorRow
 */

/**
 * @param {HTMLElement} section
 * @param {import("./store.js").Store} store
 */
export function mount(section, store) {
  const empty = nothing("No variant has been compared with a donor yet.");
  const rows = h("tbody");
  const overview = h("div", { class: "table-scroll", tabindex: "0", role: "region",
    "aria-label": TITLE, hidden: true }, distanceTable(rows));
  section.append(empty, overview);
  const tensors = new Tensors(section);

  const ask = redraw(section, () => {
    const variants = [...store.models.values()].sort(byFamily)
      .filter((model) => model.donor !== null && model.plan !== null);
    empty.hidden = variants.length > 0 || !store.told.has("models");
    overview.hidden = variants.length === 0;
    keep(rows, variants.map((model) => [model.id, model]), distanceRow,
      (row, model) => fillDistances(row, model, store));
    tensors.draw(variants);
  }, "models", "details", "theme");
  onChoice(ask);
  tensors.changed = ask;
}

/** One variant's tensors; asked for when it is chosen. */
class Tensors {
  /** @type {TensorRow[]} */
  #rows = [];
  /** @type {string|null} which variant's, and of which plan */
  #of = null;
  /** @type {import("./cursor.js").Place|null} */
  #at = null;
  #asked = new AbortController();
  changed = () => {};

  /** @param {HTMLElement} section */
  constructor(section) {
    this.chooser = new Chooser("Variant");
    this.scale = h("div", { class: "scale", "aria-hidden": "true" });
    this.trouble = h("p", { class: "figure-note", role: "status" });
    this.figure = new Figure({
      title: "Tensors by blocks",
      about: "How far each tensor alone moved from the donor's: ε = ‖variant − donor‖ / ‖donor‖"
        + " (Eq. 2 of the block-sharing paper).",
      keys: "Arrow keys go from tensor to tensor.",
      tools: h("div", { class: "tools" }, this.chooser.element, this.scale),
    });
    this.marks = markNote();
    this.figure.walked.after(this.marks);
    this.figure.walked.hidden = this.figure.details.hidden = true;
    section.append(this.figure.element, this.trouble);
    walkable(this.figure.walked, this.figure.readout, {
      size: () => ({ rows: this.#rows.length, columns: this.#columns() }),
      show: (place) => {
        this.#at = place;
        this.changed();
        void this.figure.chart.point(place && { xval: place.column, yval: place.row });
      },
      describe: ({ row, column }) => described(this.#rows[row], column).join(", "),
    });
  }

  /** @param {Model[]} variants */
  draw(variants) {
    const id = this.chooser.offer(variants.map((model) => model.id));
    const model = variants.find((one) => one.id === id);
    this.figure.element.hidden = model === undefined;
    if (model === undefined) return;
    const wanted = `${model.id} ${model.plan?.digest}`;
    if (wanted !== this.#of) void this.#fetch(model.id, wanted);
    else if (this.#rows.length > 0) this.#show(model);
  }

  /**
   * @param {string} id
   * @param {string} wanted
   */
  async #fetch(id, wanted) {
    this.#asked.abort();
    this.#asked = new AbortController();
    this.#of = wanted;
    const { signal } = this.#asked;
    attribute(this.figure.walked, "aria-busy", "true"); // it still shows another variant's
    try {
      const found = await request("GET", `${modelPath(id)}?include=tensors`, undefined, signal);
      this.#take(tensorRows(found.details?.tensors ?? []), "Nothing is known of its tensors.");
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      this.#of = null; // asked for again when something changes
      this.#take([], error.message);
      return;
    }
    this.changed();
  }

  /**
   * @param {TensorRow[]} rows
   * @param {string} trouble why there are none, where there are none
   */
  #take(rows, trouble) {
    this.#rows = rows;
    const { walked, details } = this.figure;
    walked.hidden = details.hidden = rows.length === 0;
    if (rows.length === 0) this.marks.hidden = true;
    attribute(walked, "aria-busy", null);
    say(this.trouble, rows.length > 0 ? "" : trouble);
  }

  /** @param {Model} model */
  #show(model) {
    const rows = this.#rows;
    const shown = measure("epsilon", []);
    drawScale(this.scale, shown);
    const worst = worstOf(rows);
    this.figure.show({
      label: `Tensors of ${model.id}${worst === null ? ""
        : `; the farthest is ${worst.name}, ε ${figure(worst.epsilon)}`}`,
      make: cells({ rows, columns: this.#columns(), column: "block", measure: shown, at: this.#at,
        ends: "mean ε", marks: this.marks, strong: null,
        describe: (_, row, column) => described(/** @type {TensorRow} */ (row), column) }),
      table: () => ({
        headers: ["Tensor", "Rung", "ε", "cos"],
        rows: rows.flatMap((row) => row.cells.flatMap((cell) =>
          cell === null ? [] : [[cell.name, cell.rung, figure(cell.epsilon), cosine(cell.cos)]])),
      }),
    });
  }

  #columns() {
    return Math.max(0, ...this.#rows.map((row) => row.cells.length));
  }
}

/**
 * @param {TensorRow} row
 * @param {number} column
 * @returns {string[]}
 */
function described(row, column) {
  const cell = row.cells[column];
  if (!cell) return [`${row.name}: no such tensor in block ${column}`];
  return [`${row.name}, block ${column}`, ...facts(cell)];
}
