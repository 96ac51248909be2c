/** When a section draws itself anew: after a change, once a frame, and only while it is seen. */
import { subscribe } from "./store.js";

/**
 * Draws a section once it is in sight, and again whenever one of the topics changes. What changes
 * while it is out of sight is drawn when it comes back.
 *
 * @param {HTMLElement} section
 * @param {() => void} draw
 * @param {...import("./store.js").Topic} topics
 * @returns {() => void} which asks for a drawing, as after a choice of the user's
 */
export function redraw(section, draw, ...topics) {
  let seen = false;
  let stale = true;
  let asked = false;

  function frame() {
    asked = false;
    if (!seen || !stale) return;
    stale = false;
    draw();
  }

  function ask() {
    stale = true;
    if (!seen || asked) return;
    asked = true;
    requestAnimationFrame(frame);
  }

  const margin = "6000px"; // of a view that is shown, whatever may soon be scrolled to
  const observer = new IntersectionObserver(
    (entries) => {
      seen = entries.some((entry) => entry.isIntersecting);
      if (seen && stale) ask();
    },
    { rootMargin: margin },
  );
  observer.observe(section);
  subscribe((changes) => {
    if (topics.some((topic) => changes.has(topic))) ask();
  });
  return ask;
}
