/** Who we are to the server: the tab's key, and the forms that ask for one. */
import { ApiError, request, setKey } from "./api.js";
import { attribute, fill, h, say } from "./dom.js";
import { store, subscribe } from "./store.js";

const PAUSE_MS = 2000;
const WHY = "linker-key-refused"; // of sessionStorage: why the page began anew
const ROLES = { admin: "Admin", metrics: "Read-only", client: "Chat only", none: "No key" };

/** What is said above the field of the view that asks for a key. */
const complaint = h("p", { class: "fault", role: "alert", hidden: true });

/**
 * Asks the server who we are, for as long as it takes to answer.
 *
 * @returns {Promise<import("./types.js").Session>}
 */
export async function learnSession() {
  while (true) {
    try {
      return await request("GET", "/ui/session");
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) {
        setKey(null);
        complain(error.message);
        return { role: "none", keys_required: true, version: null };
      }
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  }
}

/** Shows the view that asks for a key. @param {string} why */
export function askForKey(why) {
  sessionStorage.setItem(WHY, why);
  changeKey(null);
}

/**
 * Begins anew with another key: nothing that was seen with the old one is left anywhere.
 *
 * @param {string|null} value null: with none
 */
function changeKey(value) {
  setKey(value);
  location.reload();
}

/** Says why the key is asked for, where the page was begun anew for that. */
function sayWhy() {
  const why = sessionStorage.getItem(WHY);
  if (why === null) return;
  sessionStorage.removeItem(WHY);
  complain(why);
}

/** Puts the forms for a key in their places. */
export function mountKey() {
  const signIn = /** @type {HTMLElement} */ (document.getElementById("sign-in"));
  signIn.append(
    complaint,
    keyForm("sign-in-key", "Key"),
  );
  sayWhy();
  // Of somebody who was let in; who was not is told by what they asked.
  document.addEventListener("keyrefused", (event) => {
    if (store.session !== null) askForKey(/** @type {CustomEvent<string>} */ (event).detail);
  });
  const dialog = keyDialog();
  document.body.append(dialog);
  const button = /** @type {HTMLButtonElement} */ (document.getElementById("key-button"));
  button.addEventListener("click", () => dialog.showModal());
  subscribe((topics) => {
    if (!topics.has("session") || store.session === null) return;
    const { role, keys_required: required } = store.session;
    button.hidden = !required || role === "none";
    say(button, ROLES[role]);
    button.setAttribute("aria-label", `Key: ${ROLES[role]}. Change it`);
  });
  themeButton();
}

/** @param {string} why */
function complain(why) {
  say(complaint, why);
  complaint.hidden = false;
}

/** @returns {HTMLDialogElement} */
function keyDialog() {
  const dialog = h("dialog", { "aria-labelledby": "key-title" });
  const close = () => dialog.close();
  const form = keyForm("key-field", "Another key");
  const forgetKey = () => changeKey(null);
  fill(
    dialog,
    h("h2", { id: "key-title" }, "Your key"),
    form,
    h(
      "div",
      { class: "row end" },
      h("button", { type: "button", class: "quiet", on: { click: forgetKey } }, "Forget the key"),
      h("button", { type: "button", on: { click: close } }, "Close"),
    ),
  );
  return dialog;
}

/**
 * @param {string} id of the field
 * @param {string} label
 */
function keyForm(id, label) {
  const hint = `${id}-hint`;
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const field = h("input", {
    id,
    type: "password",
    required: true,
    autocomplete: "off",
    spellcheck: "false",
    placeholder: "sk-linker-…",
    "aria-describedby": hint,
  });
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    const value = field.value.trim();
    const wrong = flaw(value);
    say(fault, wrong ?? "");
    fault.hidden = wrong === null;
    complaint.hidden = true;
    attribute(field, "aria-invalid", wrong === null ? null : "true");
    if (wrong === null) changeKey(value);
    else field.focus();
  };
  return h(
    "form",
    { class: "stack", novalidate: true, on: { submit } },
    h(
      "div",
      { class: "field" },
      h("label", { for: id }, label),
      field,
      fault,
      h("p", { id: hint, class: "hint" }, "Kept in this tab until it is closed, and sent nowhere else."),
    ),
    h("div", { class: "row" }, h("button", { class: "primary" }, "Use this key")),
  );
}

/**
 * @param {string} value
 * @returns {string|null} what keeps it from being anybody's key
 */
function flaw(value) {
  if (value === "") return "Fill this in.";
  if (!/^[\x21-\x7e]+$/.test(value)) {
    return "A key has no spaces and nothing but the letters, digits and signs of ASCII; this has others.";
  }
  return null;
}

function themeButton() {
  const button = /** @type {HTMLButtonElement} */ (document.getElementById("theme-button"));
  const show = () => {
    const other = document.documentElement.dataset.theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `${other} theme`);
    button.title = `${other} theme`;
  };
  button.addEventListener("click", () => document.dispatchEvent(new Event("themechoice")));
  document.addEventListener("themechange", show);
  show();
}
