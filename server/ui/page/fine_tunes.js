/** The section of a family's fine-tunes: what each added, how they lie to each other, and findings. */
import { walkable } from "./cursor.js";
import { fill, h } from "./dom.js";
import { Figure } from "./figure.js";
import { counted, figure, percent } from "./format.js";
import { cosine } from "./measures.js";
import { redraw } from "./redraw.js";
import { cosineCells } from "./shares.js";
import { shownStudy } from "./studies.js";

/**
 * @typedef {import("./types.js").StudySummary} Summary
 * @typedef {import("./types.js").StudiedVariant} StudiedVariant
 */

const TITLE = "What each fine-tune added";
const HEADERS = ["Fine-tune", "Role", "Mean norm", "Mean ε", "Loading", "Jackknife", "Least", "Findings"];
const ABOUT = "Norm: of what was added to a tensor. ε: |Δ| / |W| of the base. Loading: the square of its"
  + " part in PC1, uncentred; above 80 % it carries PC1 alone. Jackknife: cosine of PC1 with it and without it"
  + " (FM §4.6), the mean and the least over tensors; a core member's is above 0.95. All are means over"
  + " tensors.";
const ROLES = { core: "good", periphery: "warn" };
/** What is worth a look, and what merely says how a fine-tune was made. */
const TONES = { degenerate: "bad", outlier: "warn", single_source: "warn", monoculture: "warn" };

/** @param {HTMLElement} section which is hidden until a study has ended */
export function mount(section) {
  /** @type {Summary|null} */
  let summary = null;
  /** @type {import("./cursor.js").Place|null} */
  let at = null;
  const rows = h("tbody");
  const table = h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": TITLE },
    h("table", { class: "numbers" }, h("caption", { class: "unseen" }, TITLE),
      h("thead", {}, h("tr", {}, HEADERS.map((name) => h("th", { scope: "col" }, name)))), rows));
  const findings = h("ul", { class: "findings" });
  const found = h("div", {}, h("h3", { class: "figure-title" }, "Findings"), findings);
  const chart = new Figure({
    title: "Cosines between fine-tunes",
    about: "Between what two of them added, a mean over tensors: 1 the same direction, 0 unrelated,"
      + " −1 opposite.",
    keys: "Arrow keys go from pair to pair.",
  });
  section.append(h("p", { class: "figure-note" }, ABOUT), table,
    h("div", { class: "charts-pair" }, chart.element, found));
  const ask = redraw(/** @type {HTMLElement} */ (section.parentElement), draw, "studies", "theme");
  walkable(chart.walked, chart.readout, {
    size: () => ({ rows: names(summary).length, columns: names(summary).length }),
    show: (place) => {
      at = place;
      ask();
    },
    describe: ({ row, column }) => between(/** @type {Summary} */ (summary), row, column).join(", "),
  });

  function draw() {
    summary = shownStudy()?.summary ?? null;
    section.hidden = summary === null;
    if (summary === null) return;
    fill(rows, Object.entries(summary.variants).map(([name, one]) => variantRow(name, one)));
    found.hidden = summary.diagnostics.length === 0;
    fill(findings, summary.diagnostics.map(finding));
    chart.element.hidden = names(summary).length < 2;
    if (names(summary).length >= 2) drawCosines(chart, summary, at);
  }
}

/** @param {Summary|null} summary */
function names(summary) {
  return summary?.pairwise_cosine.names ?? [];
}

/**
 * @param {string} name
 * @param {StudiedVariant} one
 */
function variantRow(name, one) {
  const { role } = one;
  return h("tr", {}, h("th", { scope: "row" }, name),
    h("td", {}, role === null ? "–" : h("span", { class: "chip", dataset: { tone: ROLES[role] } }, role)),
    h("td", {}, figure(one.delta_norm)), h("td", {}, figure(one.epsilon)),
    h("td", {}, percent(one.loading_uncentred)), h("td", {}, figure(one.jackknife_cosine)),
    h("td", {}, figure(one.jackknife_cosine_min)),
    h("td", {}, one.diagnostics.length === 0 ? "none" : one.diagnostics.map(kindChip)));
}

/** @param {{kind: string}} found */
function kindChip({ kind }) {
  const tone = /** @type {Record<string, string>} */ (TONES)[kind] ?? "quiet";
  return h("span", { class: "chip", dataset: { tone } }, kind.replaceAll("_", " "));
}

/** @param {import("./types.js").StudyFinding} found */
function finding(found) {
  return h("li", {}, kindChip(found), " ", h("b", {}, found.model), `: ${found.reason}`);
}

/**
 * @param {Summary} summary
 * @param {number} row
 * @param {number} column
 * @returns {string[]}
 */
function between({ pairwise_cosine: { names: of, matrix, null95 } }, row, column) {
  const said = [`${of[row]} and ${of[column]}`, `cos ${cosine(matrix[row][column])}`];
  if (row !== column) said.push(`unrelated ones stay below ${figure(null95[row][column])}`);
  return said;
}

/**
 * @param {Figure} chart
 * @param {Summary} summary
 * @param {import("./cursor.js").Place|null} at
 */
function drawCosines(chart, summary, at) {
  const { names: of, matrix, mean } = summary.pairwise_cosine;
  const describe = (/** @type {number} */ row, /** @type {number} */ column) =>
    between(summary, row, column);
  chart.show({
    label: `Cosines between ${counted(of.length, "fine-tune")}; their mean is ${figure(mean)}`,
    make: cosineCells({ names: of, matrix, at, describe }),
    legend: [
      { token: "--e-4", name: "same direction" },
      { token: "--e-0", name: "unrelated" },
      { token: "--c-own", name: "opposite" },
    ],
    table: () => ({
      headers: ["Fine-tune", ...of],
      rows: of.map((name, row) => [name, ...matrix[row].map((value) => figure(value))]),
    }),
  });
}
