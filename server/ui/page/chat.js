/** One prompt to two models, or to one model as planned and unshared, side by side. */
import { ApiError, request } from "./api.js";
import { areaField, textField } from "./fields.js";
import { attribute, h, say } from "./dom.js";
import { counted } from "./format.js";
import { makePane } from "./pane.js";
import { store, subscribe } from "./store.js";

/** @param {HTMLElement} section */
export function mount(section) {
  const panes = [makePane("a", "Left", hush), makePane("b", "Right", hush)];
  const system = areaField("chat-system", "System prompt", { rows: 2 });
  const temperature = textField("chat-temperature", "Temperature", {
    type: "number", min: "0", max: "2", step: "any", value: "0",
    hint: "Above 0, both sides draw from the same seed",
  });
  const most = textField("chat-tokens", "Most tokens", {
    type: "number", min: "1", step: "1", hint: "Empty: until it ends or its context is full",
  });
  const bounded = [
    { field: temperature, limits: "A number from 0 to 2." },
    { field: most, limits: "A whole number from 1 on, or nothing." },
  ];
  const prompt = areaField("chat-prompt", "Prompt", { rows: 3, required: true });
  const send = h("button", { class: "primary" }, "Send");
  const stop = h("button", { type: "button", hidden: true }, "Stop");
  const clear = h("button", { type: "button", class: "quiet" }, "Clear");
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const verdict = h("p", { class: "verdict-of-both" });
  const news = h("p", { class: "unseen", role: "status" });
  /** @type {AbortController|null} */
  let running = null;

  async function ask() {
    const text = prompt.input.value.trim();
    if (running !== null || text === "") return;
    hush();
    if (!areGood()) return;
    running = new AbortController();
    busy(true);
    prompt.input.value = "";
    const { signal } = running;
    const options = choices();
    const answers = await Promise.all(panes.map((pane) => pane.ask(text, options, signal)));
    running = null;
    busy(false);
    const isUnheard = answers.every((one) => one === null || (one.hasFailed && one.said === ""));
    const isTried = answers.some((one) => one !== null); // else it was cleared
    if (isUnheard && isTried && prompt.input.value === "") prompt.input.value = text;
    const both = compared(answers[0], answers[1]);
    say(verdict, both);
    say(news, [...answers.map(readOut), both].filter((text) => text !== "").join(" "));
  }

  /** Takes back what was said of both sides: it is not so any more. */
  function hush() {
    say(verdict, "");
    say(news, "");
    fault.hidden = true;
  }

  /** @returns {boolean} whether there is somebody to ask, and options to ask with; says what is wrong */
  function areGood() {
    if (panes.every((pane) => pane.isNobody())) {
      say(fault, "Nobody is asked: choose a model on the left, on the right, or on both.");
      fault.hidden = false;
      return false;
    }
    const wrong = bounded.filter(({ field, limits }) => {
      const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = field.input.validity;
      const isBad = badInput || rangeUnderflow || rangeOverflow || stepMismatch;
      field.complain(isBad ? limits : null);
      return isBad;
    });
    if (wrong.length === 0) return true;
    wrong[0].field.element.closest("details")?.setAttribute("open", "");
    wrong[0].field.input.focus();
    return false;
  }

  function choices() {
    return {
      system: system.input.value.trim(),
      temperature: numberOf(temperature.input.value),
      max_tokens: numberOf(most.input.value),
      seed: Math.floor(Math.random() * 2 ** 31),
    };
  }

  /** @param {boolean} is */
  function busy(is) {
    attribute(send, "aria-disabled", is || null);
    const hadFocus = document.activeElement === stop || document.activeElement === send;
    stop.hidden = !is;
    if (is && hadFocus) stop.focus();
    if (!is && hadFocus) prompt.input.focus();
  }

  async function listModels() {
    if (store.session?.role !== "client") return;
    try {
      const found = await request("GET", "/v1/models");
      for (const pane of panes) pane.offer(found.data.map(served));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      for (const pane of panes) pane.complain(error.message);
    }
  }

  for (const { element } of panes) element.addEventListener("focusin", () => void listModels());
  stop.addEventListener("click", () => running?.abort());
  clear.addEventListener("click", () => {
    running?.abort();
    for (const pane of panes) pane.clear();
    prompt.input.focus();
  });
  prompt.input.addEventListener("keydown", (event) => {
    const { key, shiftKey, isComposing } = /** @type {KeyboardEvent} */ (event);
    if (key !== "Enter" || shiftKey || isComposing) return;
    event.preventDefault();
    void ask();
  });
  const form = h(
    "form",
    { class: "ask stack", novalidate: true },
    prompt.element,
    fault,
    h("div", { class: "row" }, send, stop, clear, h("span", { class: "hint" }, "Enter sends, Shift and Enter begin a line")),
    h("details", {}, h("summary", {}, "Options"), h("div", { class: "grid options" }, system.element, temperature.element, most.element)),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void ask();
  });
  section.append(h("div", { class: "panes" }, panes.map((pane) => pane.element)), verdict, form, news);
  subscribe((topics) => {
    if (topics.has("session")) void listModels();
    if (!topics.has("models")) return;
    // Whatever has a plan: what is on its way back after a restart is the same conversation's.
    const usable = [...store.models.values()].filter(({ plan, state }) => plan !== null && state !== "failed");
    for (const pane of panes) pane.offer(usable.map(choice));
  });
}

/**
 * @param {import("./pane.js").Answer|null} answer
 * @returns {string} for those who listen
 */
function readOut(answer) {
  return answer === null ? "" : `${answer.model}: ${answer.said === "" ? "no answer." : answer.said}`;
}

/**
 * @param {import("./pane.js").Answer|null} left
 * @param {import("./pane.js").Answer|null} right
 * @returns {string} how far both say the same; nothing where they are not two
 */
function compared(left, right) {
  if (left === null || right === null || left.said === "" || right.said === "") return "";
  if (left.said === right.said) return "Both answers are the same.";
  const [words, others] = [left.said.split(/\s+/), right.said.split(/\s+/)];
  const parting = words.findIndex((word, index) => word !== others[index]);
  const same = parting < 0 ? words.length : parting;
  if (same === 0) return "The answers differ from the first word on.";
  return `The answers are the same for ${counted(same, "word")}, and differ from there on.`;
}

/**
 * @param {{id: string, parent: string|null}} card of /v1/models
 * @returns {import("./pane.js").Choice}
 */
function served(card) {
  return { id: card.id, canUnshare: card.parent !== null };
}

/**
 * @param {import("./types.js").Model} model
 * @returns {import("./pane.js").Choice}
 */
function choice({ id, donor, plan }) {
  const isBrought = plan?.policy === "delta" || plan?.policy === "adapter"; // it has no own weights
  return { id, canUnshare: donor !== null && !isBrought && !plan?.lossless };
}

/**
 * @param {string} text
 * @returns {number|undefined} undefined: as the model says
 */
function numberOf(text) {
  return text.trim() === "" ? undefined : Number(text);
}
