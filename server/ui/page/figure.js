/** The frame around a chart: its title, what its colours mean, and its numbers as a table. */
import { Chart } from "./charts.js";
import { fill, h, say } from "./dom.js";

/**
 * @typedef {{headers: string[], rows: (string|number)[][]}} Table texts and numbers as they are
 *   shown; the first column names the row
 * @typedef {{token: string, name: string, pattern?: string}} Key a colour and what it stands for
 */

const FAILED = "The charts could not be loaded. The table has the same numbers.";

/** A chart with everything that belongs to it; hidden until there is something to show. */
export class Figure {
  /** @type {(() => Table)|null} */
  #table = null;

  /**
   * @param {object} options
   * @param {string} options.title
   * @param {string} options.about one sentence that says how to read it
   * @param {string} [options.keys] how the keyboard moves in it; without it, it takes no focus
   * @param {(point: any) => void} [options.onClick]
   * @param {HTMLElement} [options.tools] what changes how it is shown
   */
  constructor({ title, about, keys, onClick, tools }) {
    this.title = title;
    this.note = h("p", { class: "figure-note" }, about);
    this.legend = h("ul", { class: "legend", "aria-label": "Colours" });
    this.image = h("div", { class: "plot", role: "img", "aria-label": title });
    this.walked = h("div", { class: "plot-frame" }, this.image);
    if (keys !== undefined) {
      this.walked.tabIndex = 0;
      this.walked.setAttribute("role", "group");
      this.walked.setAttribute("aria-label", `${title}. ${keys}`);
    }
    this.readout = h("p", { class: "unseen", "aria-live": "polite" });
    this.failure = h("p", { class: "figure-note", role: "status" });
    this.body = h("div", { class: "table-scroll", tabindex: "0", role: "region",
      "aria-label": `${title}: table` });
    this.details = h("details", { class: "as-table", on: { toggle: () => this.#fillTable() } },
      h("summary", {}, "Show as table"), this.body);
    this.heading = h("h3", { class: "figure-title" }, title);
    this.element = h("figure", { class: "figure", hidden: true },
      h("figcaption", {}, this.heading, this.note),
      tools, this.legend, this.walked, this.readout, this.failure, this.details);
    this.chart = new Chart(this.image, {
      onClick,
      onFailure: () => {
        say(this.failure, FAILED);
        this.details.open = true;
      },
      onDrawn: () => say(this.failure, ""),
    });
  }

  /**
   * @param {object} content
   * @param {string} content.label what the chart shows, in words, with its main numbers
   * @param {import("./charts.js").Make} content.make
   * @param {() => Table} content.table made when somebody opens it
   * @param {Key[]} [content.legend]
   */
  show({ label, make, table, legend = [] }) {
    this.element.hidden = false;
    this.image.setAttribute("aria-label", label);
    this.#table = table;
    this.legend.hidden = legend.length === 0;
    fill(this.legend, legend.map(legendItem));
    this.chart.draw(make);
    this.#fillTable();
  }

  #fillTable() {
    if (!this.details.open || this.#table === null) return;
    const { headers, rows } = this.#table();
    fill(this.body, h("table", { class: "numbers" },
      h("caption", { class: "unseen" }, this.title),
      h("thead", {}, h("tr", {}, headers.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map(([name, ...cells]) =>
        h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", {}, cell)))))));
  }
}

/**
 * @param {string} name of a colour of the theme
 * @param {string} [pattern] as plotly calls it
 * @returns {HTMLElement} a patch of it
 */
export function swatch(name, pattern = "") {
  const patch = h("span", { class: "swatch", "aria-hidden": "true" });
  patch.style.color = `var(${name})`;
  if (pattern !== "") patch.dataset.pattern = pattern;
  return patch;
}

/** @param {Key} key */
function legendItem({ token, name, pattern }) {
  return h("li", {}, swatch(token, pattern), name);
}

/**
 * @param {string} text
 * @returns {HTMLElement} what a section says while it has nothing to show; hidden until it is known
 */
export function nothing(text) {
  return h("p", { class: "nothing", hidden: true }, text);
}
