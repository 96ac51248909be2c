/** What the server's studies of fine-tuning say: fetched while somebody looks, and which is shown. */
import { ApiError, request } from "./api.js";
import { changed, store, subscribe } from "./store.js";

const WORKING_MS = 2000; // from look to look while one is at work
const RESTING_MS = 20_000;

/**
 * @typedef {import("./types.js").Study} Study
 * @typedef {import("./types.js").StudySummary} StudySummary
 */

/** @type {string|null} */
let chosen = null;

/** @returns {string[]} families that can be shown, those with a study first */
export function families() {
  const studies = [...store.studies.values()].filter(
    (study) => study.variants.length > 0 || Object.keys(study.left_out).length > 0);
  const found = studies.filter((study) => study.finished_at !== null);
  return [...found, ...studies.filter((study) => study.finished_at === null)]
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
  void ask(fetchShown);
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
    if (!document.hidden) await ask(fetchStudies);
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

/**
 * Tells of what was fetched, or why nothing was.
 *
 * @param {() => Promise<void>} fetchSome
 */
async function ask(fetchSome) {
  try {
    await fetchSome();
    store.studiesFault = null;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    store.studiesFault = error.message;
  }
  changed("studies");
}

async function fetchStudies() {
  const { data } = await request("GET", "/analysis");
  store.told.add("studies");
  store.studies = new Map(data.map((/** @type {Study} */ one) =>
    [one.family, { ...one, summary: known(one) }]));
  await fetchShown();
}

/** Of the family that is shown alone: what was found of many fine-tunes is long. */
async function fetchShown() {
  const shown = shownStudy();
  if (shown === null || shown.finished_at === null || shown.summary !== null) return;
  const path = shown.family.split("/").map(encodeURIComponent).join("/");
  const study = await request("GET", `/analysis/${path}`);
  store.studies.set(study.family, study);
}

/**
 * @param {Study} study
 * @returns {StudySummary|null} what was found, where that very study was fetched before
 */
function known({ family, finished_at: finishedAt }) {
  const before = store.studies.get(family);
  return before !== undefined && before.finished_at === finishedAt ? before.summary : null;
}
