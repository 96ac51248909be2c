/** One side of the chat: a model, how its weights are stored, and its conversation. */
import { ApiError, stream } from "./api.js";
import { choiceField, offer } from "./fields.js";
import { h, say } from "./dom.js";
import { counted, figure, span } from "./format.js";
import { makeTranscript } from "./transcript.js";

const NOBODY = "";

/**
 * @typedef {{id: string, canUnshare: boolean}} Choice
 * @typedef {{system: string, temperature: number|undefined, max_tokens: number|undefined, seed: number}} Options
 * @typedef {{role: string, content: string}} Message
 * @typedef {{model: string, said: string, hasFailed: boolean}} Answer what was said until it ended,
 *   failed or was stopped
 */

/**
 * @param {string} id of this side
 * @param {string} side its name
 * @param {() => void} onOver called when the conversation is over, and another begins
 */
export function makePane(id, side, onOver) {
  const model = choiceField(`chat-model-${id}`, `${side} model`, []);
  const mode = choiceField(`chat-mode-${id}`, `${side} weights`, [
    ["planned", "Planned"],
    ["unshared", "Unshared"],
  ]);
  const transcript = makeTranscript(`${side} conversation`, "What you ask goes to both sides.");
  const meter = h("p", { class: "meter" });
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const chosen = /** @type {HTMLSelectElement} */ (model.input);
  /** @type {Choice[]} */
  let choices = [];
  /** @type {Message[]} */
  let messages = [];
  let conversation = new AbortController(); // ends the answer that is under way with it
  let isChosen = false; // by a person: nothing else is put in its place

  /** Says which choices there are. @param {Choice[]} given */
  function offerModels(given) {
    if (JSON.stringify(given) === JSON.stringify(choices)) return;
    choices = given;
    const before = chosen.value;
    const known = given.map((one) => /** @type {[string, string]} */ ([one.id, one.id]));
    offer(chosen, [...known, [NOBODY, "Nobody"]]);
    if (given.length === 0) {
      clear(); // the server is somebody else's now, or we are
      isChosen = false;
    } else if (!isChosen) begin();
    else if (chosen.value !== before) {
      clear();
      complain(`${before} is gone.`);
    }
    showModes();
  }

  /** Left a variant; right the next one, or the same as it was before it was shared. */
  function begin() {
    const variants = choices.filter((one) => one.canUnshare);
    const start = choices.indexOf(variants[0] ?? choices[0]);
    mode.input.value = "planned";
    if (id === "a") chosen.selectedIndex = start;
    else if (variants.length === 1) {
      chosen.selectedIndex = start;
      mode.input.value = "unshared";
    } else chosen.selectedIndex = Math.min(start + 1, choices.length); // behind the last: nobody
  }

  function showModes() {
    const can = choices.find((one) => one.id === chosen.value)?.canUnshare ?? false;
    mode.element.hidden = !can;
    if (!can) mode.input.value = "planned";
  }

  function clear() {
    conversation.abort();
    conversation = new AbortController();
    messages = [];
    transcript.clear();
    say(meter, "");
    fault.hidden = true;
    onOver();
  }

  /** @returns {boolean} whether no model is chosen */
  function isNobody() {
    return chosen.value === NOBODY;
  }

  /** @param {string} message */
  function complain(message) {
    say(fault, message);
    fault.hidden = false;
  }

  /**
   * Asks the model, and shows its answer as it comes.
   *
   * @param {string} text
   * @param {Options} options
   * @param {AbortSignal} stopped which ends the answer where it is
   * @returns {Promise<Answer|null>} null: nobody was asked, or the conversation is over
   */
  async function ask(text, { system, ...options }, stopped) {
    isChosen = true;
    if (isNobody()) return null;
    fault.hidden = true;
    say(meter, "");
    const over = conversation.signal;
    const signal = AbortSignal.any([stopped, over]);
    const question = { role: "user", content: text };
    const head = system === "" ? [] : [{ role: "system", content: system }];
    const asked = transcript.turn("You", text, { isMine: true });
    const isUnshared = mode.input.value === "unshared";
    const answer = transcript.turn(isUnshared ? `${chosen.value}, unshared` : chosen.value, "");
    transcript.busy(true);
    const body = {
      model: chosen.value,
      messages: [...head, ...messages, question],
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      ...(mode.element.hidden ? {} : { variant_mode: mode.input.value }),
      ...options,
    };
    let said = "";
    let hasFailed = true; // or it was stopped
    try {
      said = await listen(body, answer, signal);
      hasFailed = false;
    } catch (error) {
      said = answer.data;
      if (error instanceof ApiError && !over.aborted) complain(error.message);
      else if (!signal.aborted) throw error;
    } finally {
      transcript.busy(false);
    }
    if (over.aborted) return null;
    if (said === "" && hasFailed) {
      transcript.drop(answer);
      transcript.drop(asked);
    }
    if (said !== "") messages.push(question, { role: "assistant", content: said });
    return { model: body.model, said, hasFailed };
  }

  /**
   * @param {object} body
   * @param {Text} answer grows
   * @param {AbortSignal} signal
   * @returns {Promise<string>}
   */
  async function listen(body, answer, signal) {
    const begun = performance.now();
    let first = 0;
    let isCut = false;
    for await (const event of stream("POST", "/v1/chat/completions", body, signal)) {
      const delta = event.choices[0]?.delta?.content ?? "";
      if (delta !== "") {
        first ||= performance.now();
        transcript.append(answer, delta);
      }
      isCut ||= event.choices[0]?.finish_reason === "length";
      if (event.usage) measure(event.usage, begun, first);
    }
    if (isCut) say(meter, `${meter.textContent} · cut at its limit`);
    return answer.data;
  }

  /**
   * @param {{prompt_tokens: number, completion_tokens: number}} usage
   * @param {number} begun milliseconds
   * @param {number} first likewise; 0: nothing has come yet
   */
  function measure(usage, begun, first) {
    const seconds = (performance.now() - first) / 1000;
    const after = usage.completion_tokens - 1; // the first is where the clock starts
    const rate = first > 0 && after > 0 && seconds > 0 ? `${figure(after / seconds)} tok/s · ` : "";
    const wait = first > 0 ? ` · first after ${span((first - begun) / 1000)}` : "";
    const tokens = `${usage.prompt_tokens} in, ${counted(usage.completion_tokens, "token")} out`;
    say(meter, `${rate}${tokens}${wait}`);
  }

  for (const { input } of [model, mode]) {
    input.addEventListener("change", () => {
      isChosen = true;
      showModes();
      clear();
    });
  }
  showModes();
  const element = h(
    "div",
    { class: "pane", role: "group", "aria-label": `${side} side` },
    h("div", { class: "pair-of-fields" }, model.element, mode.element),
    transcript.element,
    fault,
    meter,
  );
  return { element, offer: offerModels, ask, clear, complain, isNobody };
}
