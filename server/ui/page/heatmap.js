/** The section of variants by blocks: how far each block lies from its donor's, and its rung. */
import { choose, chosenOf, onChoice } from "./choice.js";
import { walkable } from "./cursor.js";
import { h, say } from "./dom.js";
import { Figure, nothing } from "./figure.js";
import { bytes, counted, figure } from "./format.js";
import { cells, drawScale, markNote } from "./grid.js";
import { cosine, facts, MEASURES, measure, ROW_ENDS, rowEnd } from "./measures.js";
import { byFamily } from "./memory.js";
import { redraw } from "./redraw.js";

/**
 * @typedef {import("./types.js").Block} Block
 * @typedef {import("./grid.js").Row & {blocks: Block[]}} VariantRow
 */

const KEYS = "Arrow keys go from block to block, Enter chooses the variant.";

/**
 * @param {HTMLElement} section
 * @param {import("./store.js").Store} store
 */
export function mount(section, store) {
  /** @type {VariantRow[]} */
  let rows = [];
  /** @type {import("./cursor.js").Place|null} */
  let at = null;
  const select = h("select", { on: { change: () => ask() } },
    Object.entries(MEASURES).map(([value, name]) => h("option", { value }, name)));
  const scale = h("div", { class: "scale", "aria-hidden": "true" });
  const marks = markNote();
  const chart = new Figure({
    title: "Variants by blocks",
    about: "",
    keys: KEYS,
    onClick: (point) => choose(rows[point.y].id),
    tools: h("div", { class: "tools" }, h("label", { class: "chooser" }, "Colour", select), scale),
  });
  chart.walked.after(marks);
  const empty = nothing("No variant's blocks are known yet.");
  section.append(empty, chart.element);

  const ask = redraw(section, draw, "models", "details", "theme");
  onChoice(ask);
  walkable(chart.walked, chart.readout, {
    size: () => ({ rows: rows.length, columns: columnsOf(rows) }),
    show: (place) => {
      at = place;
      ask();
      void chart.chart.point(place && { xval: place.column, yval: place.row });
    },
    describe: ({ row, column }) => described(rows[row], column).join(", "),
    choose: ({ row }) => choose(rows[row].id),
  });

  function draw() {
    const by = /** @type {import("./measures.js").MeasureName} */ (select.value || "epsilon");
    rows = variantRows(store, by);
    empty.hidden = rows.length > 0 || !store.told.has("details");
    chart.element.hidden = rows.length === 0;
    if (rows.length === 0) return;
    const shown = measure(by, rows.flatMap((row) => row.blocks));
    drawScale(scale, shown);
    say(chart.note, shown.about);
    chart.show({
      label: summary(rows),
      make: cells({ rows, columns: columnsOf(rows), column: "block", measure: shown, at, marks,
        ends: ROW_ENDS[by], strong: chosenOf(rows.map((row) => row.id)),
        describe: (_, row, column) => described(/** @type {VariantRow} */ (row), column) }),
      table: () => table(rows),
    });
  }
}

/**
 * @param {import("./store.js").Store} store
 * @param {import("./measures.js").MeasureName} by what the notes at the ends are about
 * @returns {VariantRow[]} the variants whose blocks are known
 */
function variantRows(store, by) {
  const rows = [];
  for (const model of [...store.models.values()].sort(byFamily)) {
    const blocks = store.details.get(model.id)?.blocks;
    if (model.donor === null || !blocks || blocks.length === 0) continue;
    rows.push({ id: model.id, name: model.id, blocks, cells: blocks,
      note: rowEnd(by, blocks, model.plan) });
  }
  return rows;
}

/**
 * @param {VariantRow} row
 * @param {number} column
 * @returns {string[]}
 */
function described(row, column) {
  const block = row.blocks[column];
  if (block === undefined) return [`${row.name} has no such block`];
  return [`${row.name}, block ${block.index}`, ...facts(block)];
}

/**
 * @param {VariantRow[]} rows
 * @returns {number}
 */
function columnsOf(rows) {
  return Math.max(0, ...rows.map((row) => row.blocks.length));
}

/**
 * @param {VariantRow[]} rows
 * @returns {string}
 */
function summary(rows) {
  const shape = `${counted(rows.length, "variant")} by ${counted(columnsOf(rows), "block")}`;
  let far = { epsilon: -1, name: "" };
  for (const row of rows) {
    for (const { epsilon, index } of row.blocks) {
      if (epsilon === null || epsilon <= far.epsilon) continue;
      far = { epsilon, name: `block ${index} of ${row.name}` };
    }
  }
  if (far.epsilon < 0) return shape;
  return `${shape}; the farthest is ${far.name}, ε ${figure(far.epsilon)}`;
}

/**
 * @param {VariantRow[]} rows
 * @returns {import("./figure.js").Table}
 */
function table(rows) {
  return {
    headers: ["Variant", "Block", "Rung", "ε", "cos", "Own bytes"],
    rows: rows.flatMap((row) => row.blocks.map((block) =>
      [row.name, block.index, block.rung, figure(block.epsilon), cosine(block.cos),
        bytes(block.unique_bytes)])),
  };
}
