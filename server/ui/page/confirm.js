/** A question that has to be answered before something is done. */
import { h } from "./dom.js";

/**
 * @typedef {object} Question
 * @property {string} title
 * @property {string} text
 * @property {string} verb what is about to be done
 * @property {string|null} [option] what may be asked for beside it
 */

/**
 * Asks, and returns what was answered.
 *
 * @param {Question} question
 * @returns {Promise<{option: boolean}|null>} null: it was thought better of
 */
export function confirmed(question) {
  const option = h("input", { type: "checkbox", id: "confirm-option" });
  const go = h("button", { type: "button", class: "danger" }, question.verb);
  const stay = h("button", { type: "button", autofocus: true }, "Cancel");
  const dialog = h(
    "dialog",
    { "aria-labelledby": "confirm-title", "aria-describedby": "confirm-text" },
    h("h2", { id: "confirm-title" }, question.title),
    h("p", { id: "confirm-text" }, question.text),
    question.option != null &&
      h("label", { class: "check", for: "confirm-option" }, option, h("span", {}, question.option)),
    h("div", { class: "row end" }, stay, go),
  );
  return new Promise((resolve) => {
    let isMeant = false;
    go.addEventListener("click", () => {
      isMeant = true;
      dialog.close();
    });
    stay.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(isMeant ? { option: option.checked } : null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
