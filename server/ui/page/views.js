/** The page's views: which is shown, by the address' fragment, and which there are for whom. */

/** Views by role; the first is where one starts. */
const FOR = {
  admin: ["overview", "sharing", "analysis", "talk"],
  metrics: ["overview", "sharing", "analysis"],
  client: ["talk"],
  none: ["sign-in"],
};

/** @type {string[]} */
let allowed = [];

/** @type {Map<number, number>} how far each entry of the history was scrolled, in px */
const scrolled = new Map();
let entry = 0; // of the history, which is shown
let entries = 0;

/** Shows the view that the address asks for, now and whenever it changes. */
export function mountViews() {
  history.scrollRestoration = "manual"; // else it is done before the view is there
  window.addEventListener("hashchange", () => show(true));
  window.addEventListener("scroll", () => scrolled.set(entry, window.scrollY), { passive: true });
}

/** @param {import("./types.js").Session["role"]} role */
export function allowViews(role) {
  allowed = FOR[role];
  for (const link of links()) link.hidden = !allowed.includes(link.dataset.view ?? "");
  show(false);
}

/** @param {boolean} isAsked whether somebody went there, so that focus follows */
function show(isAsked) {
  if (allowed.length === 0) return;
  const target = document.getElementById(location.hash.slice(1));
  if (target?.id === "main") return; // the skip link
  const wanted = viewOf(target);
  const view = wanted !== null && allowed.includes(wanted) ? wanted : allowed[0];
  for (const id of new Set(Object.values(FOR).flat())) {
    /** @type {HTMLElement} */ (document.getElementById(id)).hidden = id !== view;
  }
  const heading = /** @type {HTMLElement} */ (document.querySelector(`#${view} h1`));
  document.title = `${heading.textContent} · LinkerLLM`;
  for (const link of links()) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const before = enter();
  if (!isAsked) return;
  heading.focus({ preventScroll: true });
  if (before !== null) window.scrollTo(0, before);
  else if (target !== null && target.id !== view && wanted === view) target.scrollIntoView();
  else window.scrollTo(0, 0);
}

/** @returns {number|null} how far the history's entry was scrolled; null: it is a new one */
function enter() {
  const known = history.state?.entry;
  entry = known ?? ++entries;
  entries = Math.max(entries, entry);
  if (known === undefined) history.replaceState({ entry }, "");
  return scrolled.get(known) ?? null;
}

/**
 * @param {HTMLElement|null} target a view, or something in one
 * @returns {string|null}
 */
function viewOf(target) {
  return target?.closest(".view")?.id ?? null;
}

/** @returns {HTMLAnchorElement[]} */
function links() {
  return [...document.querySelectorAll(".views a")].map((link) => /** @type {any} */ (link));
}
