/** Which variant the charts of one variant show; the same in all of them. */
import { fill, h } from "./dom.js";

/** @type {string|null} */
let chosen = null;

/** @type {Set<() => void>} */
const listeners = new Set();

/**
 * @param {string[]} ids of the variants there are
 * @returns {string|null} the chosen one, else the first; null: there is none
 */
export function chosenOf(ids) {
  return chosen !== null && ids.includes(chosen) ? chosen : (ids[0] ?? null);
}

/** @param {string} id */
export function choose(id) {
  if (chosen === id) return;
  chosen = id;
  for (const listener of listeners) listener();
}

/** @param {() => void} listener called after each choice */
export function onChoice(listener) {
  listeners.add(listener);
}

/** A list to choose a variant from. */
export class Chooser {
  /** @param {string} name what is chosen */
  constructor(name) {
    this.select = h("select", { on: { change: () => choose(this.select.value) } });
    this.element = h("label", { class: "chooser", hidden: true }, name, this.select);
  }

  /**
   * @param {string[]} ids
   * @returns {string|null} the one that is chosen
   */
  offer(ids) {
    const now = chosenOf(ids);
    const known = [...this.select.options].map((option) => option.value);
    if (known.length !== ids.length || known.some((id, index) => id !== ids[index])) {
      fill(this.select, ids.map((id) => h("option", { value: id }, id)));
    }
    if (now !== null) this.select.value = now;
    this.element.hidden = ids.length === 0;
    return now;
  }
}
