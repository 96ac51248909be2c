/** A conversation as it is shown: whose turn it was, what was said, the end kept in sight. */
import { attribute, fill, h } from "./dom.js";

const STICKY_PX = 48; // nearer to the end than this, the end is kept in sight

/**
 * @param {string} name
 * @param {string} hint shown while nothing has been said
 */
export function makeTranscript(name, hint) {
  const empty = h("p", { class: "empty" }, hint);
  // Answers grow token by token: whoever asks says when to read one out.
  const quiet = { role: "log", "aria-live": "off", "aria-label": name, tabindex: "0" };
  const element = h("div", { class: "log", ...quiet }, empty);

  return {
    element,

    /**
     * Begins a turn.
     *
     * @param {string} who
     * @param {string} text
     * @param {{isMine?: boolean}} [options]
     * @returns {Text} which may grow
     */
    turn(who, text, { isMine = false } = {}) {
      const node = document.createTextNode(text);
      const kind = isMine ? "turn mine" : "turn";
      empty.remove();
      element.append(h("div", { class: kind }, h("p", { class: "who" }, who), h("p", { class: "said" }, node)));
      element.scrollTop = element.scrollHeight;
      return node;
    },

    /**
     * @param {Text} node of a turn
     * @param {string} delta
     */
    append(node, delta) {
      const atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < STICKY_PX;
      node.appendData(delta);
      if (atEnd) element.scrollTop = element.scrollHeight;
    },

    /** Takes a turn back. @param {Text} node of it */
    drop(node) {
      node.parentElement?.closest(".turn")?.remove();
      if (element.childElementCount === 0) fill(element, empty);
    },

    /** @param {boolean} is whether an answer is growing */
    busy(is) {
      attribute(element, "aria-busy", is ? "true" : null);
    },

    clear() {
      fill(element, empty);
    },
  };
}
