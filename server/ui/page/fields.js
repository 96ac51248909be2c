/** Fields of a form: a label, what is typed or chosen, a hint, and what is wrong with it. */
import { attribute, h, say } from "./dom.js";

/**
 * @typedef {object} Field
 * @property {HTMLElement} element
 * @property {HTMLInputElement|HTMLSelectElement|HTMLTextAreaElement} input
 * @property {(message: string|null) => void} complain null: nothing is wrong
 */

/**
 * A field of text or a number.
 *
 * @param {string} id
 * @param {string} label
 * @param {{hint?: string} & import("./dom.js").Props} [props] the others are the input's attributes
 * @returns {Field}
 */
export function textField(id, label, { hint, ...props } = {}) {
  const input = h("input", { id, type: "text", autocomplete: "off", spellcheck: "false", ...props });
  return field(label, input, /** @type {string|undefined} */ (hint));
}

/**
 * A field of longer text.
 *
 * @param {string} id
 * @param {string} label
 * @param {{hint?: string} & import("./dom.js").Props} [props]
 * @returns {Field}
 */
export function areaField(id, label, { hint, ...props } = {}) {
  return field(label, h("textarea", { id, ...props }), /** @type {string|undefined} */ (hint));
}

/**
 * A choice of one.
 *
 * @param {string} id
 * @param {string} label
 * @param {[value: string, text: string][]} options
 * @param {string} [hint]
 * @returns {Field}
 */
export function choiceField(id, label, options, hint) {
  const input = h("select", { id }, options.map(([value, text]) => h("option", { value }, text)));
  return field(label, input, hint);
}

/**
 * Yes or no.
 *
 * @param {string} id
 * @param {string} label
 * @returns {{element: HTMLElement, input: HTMLInputElement}}
 */
export function checkField(id, label) {
  const input = h("input", { id, type: "checkbox" });
  return { element: h("label", { class: "check", for: id }, input, h("span", {}, label)), input };
}

/**
 * Changes the options of a choice and keeps what is chosen where it is still there.
 *
 * @param {HTMLSelectElement} select
 * @param {[value: string, text: string][]} options
 */
export function offer(select, options) {
  const shown = JSON.stringify(options);
  if (select.dataset.offered === shown) return;
  select.dataset.offered = shown;
  const { value } = select;
  select.replaceChildren(...options.map(([one, text]) => h("option", { value: one }, text)));
  if (options.some(([one]) => one === value)) select.value = value;
}

/**
 * @param {string} label
 * @param {HTMLInputElement|HTMLSelectElement|HTMLTextAreaElement} input
 * @param {string} [hint]
 * @returns {Field}
 */
function field(label, input, hint) {
  const fault = h("p", { id: `${input.id}-fault`, class: "fault", hidden: true });
  const about = hint === undefined ? null : h("p", { id: `${input.id}-hint`, class: "hint" }, hint);
  attribute(input, "aria-describedby", [about?.id, fault.id].filter(Boolean).join(" "));
  const element = h("div", { class: "field" }, h("label", { for: input.id }, label), input, fault, about);
  return {
    element,
    input,
    complain(message) {
      say(fault, message ?? "");
      fault.hidden = message === null;
      attribute(input, "aria-invalid", message !== null ? "true" : null);
    },
  };
}
