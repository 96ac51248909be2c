/** Elements of text: whatever the server says is set as text and never parsed as markup. */

/**
 * @typedef {Node|string|number|null|undefined|false} Child null, undefined and false are left out
 * @typedef {Record<string, unknown>} Props attributes; `class`, `on` (listeners), `dataset`; others
 *   that are true are set empty, and those that are null, undefined or false are left out
 */

/**
 * Makes an element.
 *
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Props} [props]
 * @param {...(Child|Child[])} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") listen(element, /** @type {any} */ (value));
    else if (name === "dataset") Object.assign(element.dataset, value);
    else attribute(element, name, value);
  }
  element.append(...present(children));
  return element;
}

/**
 * Sets an attribute, or takes it away where the value is null, undefined or false.
 *
 * @param {Element} element
 * @param {string} name
 * @param {unknown} value
 */
export function attribute(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else element.setAttribute(name, value === true ? "" : String(value));
}

/**
 * Replaces what an element holds.
 *
 * @param {Element} element
 * @param {...(Child|Child[])} children
 */
export function fill(element, ...children) {
  element.replaceChildren(...present(children));
}

/**
 * Sets an element's text where it differs, so that nothing is announced or laid out anew for nothing.
 *
 * @param {Element} element
 * @param {string} text
 */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Keeps one element for each item, in their order: focus stays where it was while items change.
 * Those that somebody else took out of the parent are made anew.
 *
 * @template Item
 * @template {Element} Kept
 * @param {Element} parent which holds these elements alone
 * @param {Iterable<[string, Item]>} items by key
 * @param {(key: string, item: Item) => Kept} make
 * @param {(element: Kept, item: Item) => void} update also called of what was just made
 */
export function keep(parent, items, make, update) {
  /** @type {Map<string, Kept>} */
  const old = kept.get(parent) ?? new Map();
  const now = new Map();
  const wanted = [...items];
  const keys = new Set(wanted.map(([key]) => key));
  // First, so that no other has to move and lose the focus.
  for (const [key, element] of old) if (!keys.has(key)) element.remove();
  let next = parent.firstElementChild;
  for (const [key, item] of wanted) {
    const before = old.get(key);
    const element = before?.parentElement === parent ? before : make(key, item);
    update(element, item);
    now.set(key, element);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
  kept.set(parent, now);
}

/** @type {WeakMap<Element, Map<string, any>>} */
const kept = new WeakMap();

/**
 * @param {HTMLElement} element
 * @param {Record<string, EventListener>} listeners
 */
function listen(element, listeners) {
  for (const [type, listener] of Object.entries(listeners)) element.addEventListener(type, listener);
}

/**
 * @param {(Child|Child[])[]} children
 * @returns {(Node|string)[]}
 */
function present(children) {
  return children
    .flat()
    .filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (typeof child === "number" ? String(child) : /** @type {Node|string} */ (child)));
}
