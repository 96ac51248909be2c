/** What an operator may do with a model: the buttons of its row. */
import { ApiError, modelPath, request } from "./api.js";
import { confirmed } from "./confirm.js";
import { attribute, h, say } from "./dom.js";
import { store } from "./store.js";

/**
 * @typedef {object} Actions
 * @property {HTMLElement} element
 * @property {(model: import("./types.js").Model) => void} update
 */

/**
 * @param {string} id of the model
 * @returns {Actions}
 */
export function actions(id) {
  /** @type {import("./types.js").Model|null} */
  let model = null;
  let isBusy = false;
  const fault = h("p", { class: "under bad", role: "alert" });
  const note = h("p", { class: "under", role: "status" });
  const load = button(() => move());
  const pin = button(() => request("PATCH", modelPath(id), { pin: !model?.pinned }));
  const drop = button(() => forget());
  const all = [load, pin, drop];

  /** @param {() => Promise<unknown>} work */
  function button(work) {
    const element = h("button", { type: "button", class: "small" });
    element.addEventListener("click", () => void run(element, work));
    return element;
  }

  /**
   * @param {HTMLButtonElement} pressed
   * @param {() => Promise<unknown>} work
   */
  async function run(pressed, work) {
    if (isBusy) {
      say(note, "The last request is still under way.");
      return;
    }
    isBusy = true;
    say(fault, "");
    for (const one of all) attribute(one, "aria-disabled", true);
    pressed.dataset.busy = "yes";
    try {
      await work();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      say(fault, inWords(error, id));
    } finally {
      say(note, "");
      isBusy = false;
      delete pressed.dataset.busy;
      for (const one of all) attribute(one, "aria-disabled", null);
    }
  }

  async function move() {
    if (model?.state !== "ready") return request("POST", "/models/load", { model: id });
    if (model.donor !== null) return request("POST", "/models/unload", { model: id });
    const answer = await confirmed({
      title: `Unload ${id}?`,
      text: "It is a donor: what it shares stays on the device for as long as a variant needs it.",
      verb: "Unload",
      option: "If variants are resident, make the best of them the donor",
    });
    if (answer === null) return null;
    return request("POST", "/models/unload", { model: id, rehome: answer.option });
  }

  async function forget() {
    const users = usersOf(id);
    const refused = `Its weights are shared by ${users.join(", ")}: it is deleted only if another takes its place.`;
    const forgotten = "The server forgets its plan and its compressed weights. The checkpoint's files stay.";
    const answer = await confirmed({
      title: `Delete ${id}?`,
      text: users.length === 0 ? forgotten : `${refused} ${forgotten}`,
      verb: "Delete",
      option: users.length === 0 ? null
        : users.length === 1 ? `Make ${users[0]} the donor` : "Make the best of them the donor",
    });
    if (answer === null) return null;
    await request("DELETE", `${modelPath(id)}${answer.option ? "?rehome=true" : ""}`);
    document.getElementById("models-title")?.focus(); // the button goes with its row
    return null;
  }

  return {
    element: h("div", {}, h("div", { class: "row" }, all), note, fault),
    update(now) {
      model = now;
      label(load, now.state === "ready" ? "Unload" : "Load", id);
      load.hidden = now.state === "failed" || now.state === "onboarding";
      label(pin, now.pinned ? "Unpin" : "Pin", id);
      pin.hidden = now.state === "failed";
      label(drop, "Delete", id);
    },
  };
}

/**
 * @param {ApiError} error
 * @param {string} id of the model
 * @returns {string} what went wrong, and what to do about it here
 */
function inWords(error, id) {
  if (error.code !== "conflict" || !error.message.includes("rehome=true")) return error.message;
  const users = usersOf(id);
  const whose = users.length === 0 ? "others" : users.join(", ");
  return `Its weights are shared by ${whose}. Take ${users.length === 1 ? "it" : "those"} away first, or tick the box that makes one of them the donor.`;
}

/**
 * @param {string} id of a donor
 * @returns {string[]} its variants
 */
function usersOf(id) {
  return [...store.models.values()].filter(({ donor }) => donor === id).map((one) => one.id);
}

/**
 * @param {HTMLElement} element
 * @param {string} verb
 * @param {string} id
 */
function label(element, verb, id) {
  say(element, verb);
  attribute(element, "aria-label", `${verb} ${id}`);
}
