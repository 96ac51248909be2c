/** The section of what a family's fine-tunes have in common: shares, layers, and the kernel. */
import { walkable } from "./cursor.js";
import { h, say } from "./dom.js";
import { Figure, nothing } from "./figure.js";
import { counted, figure, percent } from "./format.js";
import { redraw } from "./redraw.js";
import { layerCurve, shareBars } from "./shares.js";
import { shownStudy } from "./studies.js";

/**
 * @typedef {import("./types.js").StudySummary} Summary
 * @typedef {import("./types.js").SharePair} SharePair
 */

const COMPONENTS = ["q", "k", "v", "o", "gate", "up", "down", "attention", "mlp", "all"];
/** How a share is reckoned, by the suffix of its fields. */
const WAYS = /** @type {const} */ ({
  _centred: "centred",
  "": "uncentred",
  _normalised_centred: "centred, of equal norms",
  _normalised: "uncentred, of equal norms",
});
const TOO_FEW = "Principal components begin with three fine-tunes: centred, two lie on a line whatever"
  + " they are.";

/** @param {HTMLElement} section which is hidden until a study has ended */
export function mount(section) {
  /** @type {SharePair[]} */
  let rows = [];
  /** @type {number|null} */
  let at = null;
  const select = h("select", { on: { change: () => ask() } },
    Object.entries(WAYS).map(([value, name]) => h("option", { value }, name)));
  const shares = new Figure({
    title: "PC1 by component, against its null",
    about: "Share of what fine-tunes added that lies along one direction, a mean over tensors (FM Eq. 2)."
      + " The thin line is its 95 % interval over parts of the tensors, the mark what 95 % of such shares are below where the fine-tunes have nothing in common.",
    keys: "Arrow keys go from component to component.",
    tools: h("div", { class: "tools" }, h("label", { class: "chooser" }, "Deltas", select)),
  });
  const alone = h("p", { class: "figure-note" });
  shares.note.after(alone);
  const gap = new LayerFigure("Attention less MLP, layer by layer",
    "PC1 of attention's projections less that of the MLP's, centred; above 0 attention is more alike.",
    { unit: "difference of shares", color: "--accent" });
  const weights = new LayerFigure("Weights of the kernel, layer by layer",
    "Mean of what the sampler weighs a layer's tensors by, from 0 to 1 (FM Eq. 3, appendix C).",
    { unit: "weight", color: "--c-alias", range: [0, 1.02] });
  const few = nothing(TOO_FEW);
  const pair = h("div", { class: "charts-pair" }, gap.figure.element, weights.figure.element);
  section.append(few, shares.element, pair);
  const ask = redraw(/** @type {HTMLElement} */ (section.parentElement), draw, "studies", "theme");
  gap.changed = weights.changed = ask;
  walkable(shares.walked, shares.readout, {
    size: () => ({ rows: rows.length, columns: 1 }),
    show: (place) => {
      at = place?.row ?? null;
      ask();
    },
    describe: ({ row }) => described(rows[row]).join(", "),
  });

  function draw() {
    const summary = shownStudy()?.summary ?? null;
    section.hidden = summary === null;
    const way = /** @type {keyof typeof WAYS} */ (select.value ?? "_centred");
    rows = summary === null ? [] : sharePairs(summary, way);
    few.hidden = rows.length > 0;
    shares.element.hidden = rows.length === 0;
    if (rows.length > 0) drawShares(shares, rows, at, WAYS[way]);
    say(alone, summary === null ? "" : carriers(summary));
    gap.draw(summary?.gap_per_layer ?? []);
    weights.draw(summary?.kernel?.weights_per_layer ?? []);
    pair.hidden = gap.isEmpty && weights.isEmpty;
  }
}

/**
 * @param {Summary} summary
 * @param {keyof typeof WAYS} way
 * @returns {SharePair[]} components that have a share and its null
 */
export function sharePairs({ components }, way) {
  return COMPONENTS.flatMap((name) => {
    const found = components[name];
    const share = found?.[`pc1${way}`];
    const null95 = found?.[`null95${way}`];
    if (share == null || null95 == null) return [];
    return [{ name, share, null95, interval: found[`interval${way}`] ?? null,
      majority: found[`majority_share${way}`] ?? null,
      significant: found[`significant_share${way}`] ?? null,
      tensors: found.num_tensors }];
  });
}

/**
 * @param {Summary} summary
 * @returns {string} a warning where one fine-tune is so large that PC1 is its direction
 */
function carriers({ diagnostics }) {
  const names = diagnostics.filter((found) => found.kind === "single_source")
    .map((found) => found.model);
  if (names.length === 0) return "";
  return `${names.join(" and ")} ${names.length === 1 ? "is" : "are"} so much larger than the rest that`
    + " PC1 is mostly that; deltas of equal norms say more of what is shared.";
}

/** @param {SharePair} row */
function described({ name, share, null95, interval, significant, tensors }) {
  const about = interval === null ? "" : ` (${within(interval)})`;
  const said = [`${name}: PC1 ${percent(share, 1)}${about}`, `its null: 95 % are below ${percent(null95, 1)}`];
  if (significant !== null) {
    said.push(`${percent(significant)} of ${counted(tensors, "tensor")} beyond their own null`);
  }
  return said;
}

/** @param {[number, number]|null} interval */
function within(interval) {
  return interval === null ? "–" : `${percent(interval[0], 1)} to ${percent(interval[1], 1)}`;
}

/**
 * @param {Figure} shares
 * @param {SharePair[]} rows
 * @param {number|null} at
 * @param {string} way
 */
function drawShares(shares, rows, at, way) {
  const beyond = rows.filter((row) => row.share > row.null95).map((row) => row.name);
  shares.show({
    label: `PC1 of ${counted(rows.length, "component")}, ${way}; beyond its null:`
      + ` ${beyond.length === 0 ? "none" : beyond.join(", ")}.`,
    make: shareBars({ rows, at, describe: described }),
    legend: [
      { token: "--accent", name: "PC1 beyond its null" },
      { token: "--c-other", name: "PC1 within its null" },
      { token: "--text", name: "mark: 95 % of the null" },
    ],
    table: () => ({
      headers: ["Component", "Tensors", "PC1", "95 % interval", "95 % of the null", "Above 50 %",
        "Beyond own null"],
      rows: rows.map((row) => [row.name, row.tensors, percent(row.share, 1), within(row.interval),
        percent(row.null95, 1),
        percent(row.majority), percent(row.significant)]),
    }),
  });
}

/** A number along the layers, which the keyboard walks through. */
class LayerFigure {
  /** @type {(number|null)[]} */
  #values = [];
  /** @type {number|null} */
  #at = null;
  #look;
  changed = () => {};

  /**
   * @param {string} name
   * @param {string} about
   * @param {{unit: string, color: string, range?: [number, number]}} look
   */
  constructor(name, about, look) {
    this.#look = look;
    this.figure = new Figure({ title: name, about, keys: "Arrow keys go from layer to layer." });
    walkable(this.figure.walked, this.figure.readout, {
      size: () => ({ rows: 1, columns: this.#values.length }),
      show: (place) => {
        this.#at = place?.column ?? null;
        this.changed();
      },
      describe: ({ column }) => this.#described(column).join(", "),
    });
  }

  get isEmpty() {
    return this.#values.every((value) => value === null);
  }

  /** @param {(number|null)[]} values by layer */
  draw(values) {
    this.#values = values;
    this.figure.element.hidden = this.isEmpty;
    if (this.isEmpty) return;
    this.figure.show({
      label: `${this.figure.title}: ${counted(values.length, "layer")},`
        + ` from ${values.map((value) => figure(value)).join(", ")}`,
      make: layerCurve({ ...this.#look, values, at: this.#at,
        describe: (layer) => this.#described(layer) }),
      table: () => ({
        headers: ["Layer", this.#look.unit],
        rows: values.map((value, layer) => [layer, figure(value)]),
      }),
    });
  }

  /** @param {number} layer */
  #described(layer) {
    return [`layer ${layer}`, `${this.#look.unit} ${figure(this.#values[layer])}`];
  }
}
