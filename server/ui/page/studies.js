/** What the server's studies of fine-tuning say: fetched while somebody looks, and which is shown. */
import { ApiError, request } from "./api.js";
import { changed, store, subscribe } from "./store.js";

const WORKING_MS = 2000; // from look to look while one is at work
const RESTING_MS = 20_000;

/** @typedef {import("./types.js").Study} Study */

/** @type {string|null} */
let chosen = null;

/** @returns {string[]} families that can be shown, those with a study first */
export function families() {
  const studies = [...store.studies.values()].filter((study) => study.variants.length > 0);
  const found = studies.filter((study) => study.summary !== null);
  return [...found, ...studies.filter((study) => study.summary === null)]
    .map((study) => study.family);
}

/** @returns {Study|null} that of the chosen family, else of the first */
export function shownStudy() {
  const [first] = families();
  return store.studies.get(chosen ?? "") ?? store.studies.get(first ?? "") ?? null;
}

/** @param {string} family */
export function chooseFamily(family) {
  chosen = family;
  changed("studies");
}

/**
 * Keeps the studies as the server has them while an element is seen.
 *
 * @param {HTMLElement} element
 */
export function followStudies(element) {
  let isSeen = false;
  let isAsking = false;
  let timer = 0;

  async function look() {
    clearTimeout(timer);
    if (!isSeen || isAsking || store.connection === "off") return;
    isAsking = true;
    if (!document.hidden) await fetchStudies();
    isAsking = false;
    const isWorking = [...store.studies.values()].some((study) => study.state === "running");
    timer = setTimeout(() => void look(), isWorking ? WORKING_MS : RESTING_MS);
  }

  new IntersectionObserver((entries) => {
    isSeen = entries.some((entry) => entry.isIntersecting);
    if (isSeen) void look();
  }).observe(element);
  subscribe((topics) => {
    if (topics.has("models") || topics.has("session")) void look(); // studies follow the models
  });
  document.addEventListener("visibilitychange", () => void look());
}

async function fetchStudies() {
  try {
    const found = await request("GET", "/analysis");
    store.studies = new Map(found.data.map((/** @type {Study} */ one) => [one.family, one]));
    store.studiesFault = null;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    store.studiesFault = error.message;
  }
  changed("studies");
}
