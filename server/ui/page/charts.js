/**
 * Charts by plotly.js: loaded once the first is drawn, at the width that there is, in the theme's
 * colours. Knows nothing of what they show.
 *
 * @typedef {{traces: object[], layout: {height: number} & Record<string, unknown>}} Spec
 * @typedef {(width: number) => Spec} Make
 */
import { FONT_SIZE } from "./axes.js";
import { h } from "./dom.js";
import { token } from "./palette.js";

const SOURCE = "/ui/plotly.min.js";
// Where elements of these names are there already, plotly adds no style sheets of its own, which a
// strict policy of contents forbids; what we need of them is in charts.css.
const STYLES = [
  "plotly.js-style-global",
  "9f215cf04c5486422605d13261cb87401f4e7763b6296af81e98efbc0130da53",
];
const CONFIG = { displayModeBar: false, responsive: false, doubleClick: false, showTips: false };

/** @type {Promise<any>|null} */
let loading = null;

/**
 * @returns {Promise<any>} plotly's functions; rejected where its file cannot be had, which the next
 *   call tries again
 */
function plotly() {
  loading ??= load().catch((error) => {
    loading = null;
    throw error;
  });
  return loading;
}

/** @returns {Promise<any>} */
function load() {
  for (const id of STYLES) {
    if (document.getElementById(id) !== null) continue;
    document.head.append(h("meta", { id, class: "no-inline-styles" }));
  }
  const script = h("script", { src: SOURCE, async: true });
  return new Promise((resolve, reject) => {
    script.addEventListener("load", () => resolve(/** @type {any} */ (globalThis).Plotly));
    script.addEventListener("error", () => {
      script.remove();
      reject(new Error(`${SOURCE} cannot be loaded`));
    });
    document.head.append(script);
  });
}

/** A place where one chart is drawn, again whenever its width changes. */
export class Chart {
  /** @type {Make|null} */
  #make = null;
  #width = 0;
  #asked = false;
  #drawn = false;
  /** @type {object|null} */
  #at = null; // whose label is shown
  #wanted = ""; // what was last begun to be drawn, as text
  #shown = ""; // what is drawn; "" while that is not sure

  /**
   * @param {HTMLElement} host which holds the chart alone
   * @param {{onClick?: (point: any) => void, onFailure?: () => void, onDrawn?: () => void}}
   *   [listeners] onClick gets plotly's point; onFailure is called where the library cannot be had
   *   or draw, onDrawn after each drawing
   */
  constructor(host, listeners = {}) {
    this.host = host;
    this.listeners = listeners;
    new ResizeObserver(() => {
      if (host.clientWidth !== this.#width) this.#ask();
    }).observe(host);
  }

  /**
   * Draws, as soon as there is room for it.
   *
   * @param {Make} make
   * @returns {void}
   */
  draw(make) {
    this.#make = make;
    this.#ask();
  }

  /**
   * Shows the label of what lies at a place, as the mouse would, once the chart is drawn.
   *
   * @param {{xval: number, yval: number}|{curveNumber: number, pointNumber: number}|null} at null
   *   hides it
   */
  async point(at) {
    this.#at = at;
    if (this.#drawn) this.#label(await plotly());
  }

  /** @param {any} library */
  #label(library) {
    if (this.#at === null) library.Fx.unhover(this.host);
    else library.Fx.hover(this.host, [this.#at]);
  }

  #ask() {
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      this.#asked = false;
      this.#paint().catch(() => this.#fail());
    });
  }

  #fail() {
    if (!this.#drawn) this.host.style.height = "";
    this.listeners.onFailure?.();
  }

  async #paint() {
    this.#width = this.host.clientWidth;
    if (this.#make === null || this.#width === 0) return;
    // Until the library has come there is its room, or the page would jump then.
    if (!this.#drawn) this.host.style.height = `${this.#make(this.#width).layout.height}px`;
    const library = await plotly();
    const { traces, layout } = this.#make(this.#width);
    const whole = { ...frame(this.#width), ...layout };
    const text = JSON.stringify([traces, whole]);
    if (text === this.#shown) return; // most of what changes in the store changes no chart
    this.#wanted = text;
    this.#shown = "";
    this.host.style.height = `${layout.height}px`;
    await library.react(this.host, traces, whole, CONFIG);
    if (this.#wanted === text) this.#shown = text;
    if (!this.#drawn) {
      this.#listen();
      if (this.#at !== null) this.#label(library);
    }
    this.#drawn = true;
    // Where plotly measures texts, far outside of the page; nobody is to read it.
    document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true");
    this.listeners.onDrawn?.();
  }

  #listen() {
    const plot = /** @type {any} */ (this.host);
    plot.on("plotly_click", (/** @type {any} */ event) => {
      this.listeners.onClick?.(event.points[0]);
    });
  }
}

/**
 * @param {number} width
 * @returns {Record<string, unknown>} what every chart looks like
 */
function frame(width) {
  const font = { family: token("--font"), size: FONT_SIZE, color: token("--soft") };
  return {
    width,
    autosize: false,
    font,
    margin: { l: 56, r: 16, t: 8, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false,
    hovermode: "closest",
    dragmode: false,
    hoverlabel: {
      bgcolor: token("--surface"),
      bordercolor: token("--edge"),
      font: { ...font, color: token("--text") },
      align: "left",
      namelength: -1,
    },
  };
}
