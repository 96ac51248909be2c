/** What is being onboarded or planned anew, how far it is, and how it ended. */
import { ApiError, request, serverNow } from "./api.js";
import { fill, h, keep, say } from "./dom.js";
import { ago, bytes, figure, span } from "./format.js";
import { ownFamily } from "./model_cells.js";
import { redraw } from "./redraw.js";
import { isAdmin } from "./store.js";

const STAGES = /** @type {const} */ (["validating", "scanning", "tuning", "loading"]);
const SHOWN = 6; // of those that have ended
const TONES = { queued: "quiet", running: "plain", succeeded: "good", failed: "bad", cancelled: "quiet" };
const TICK_MS = 10_000;

/**
 * @param {HTMLElement} section
 * @param {import("./store.js").Store} store
 */
export function mount(section, store) {
  const list = h("ul", { class: "jobs" });
  const empty = h("p", { class: "empty", hidden: true }, "Nothing is being onboarded.");
  const news = h("p", { class: "unseen", role: "status" });
  section.append(list, empty, news);
  /** @type {Map<string, string>} what was last said of each job */
  const told = new Map();

  function draw() {
    const jobs = shown(store.jobs);
    empty.hidden = jobs.length > 0 || !store.told.has("jobs");
    keep(list, jobs, make, update);
    tell(jobs.map(([, job]) => job));
  }

  /** Says where jobs have come to, once for each stage. @param {import("./types.js").Job[]} jobs */
  function tell(jobs) {
    const lines = [];
    for (const job of jobs) {
      const where = job.status === "running" ? job.stage : job.status;
      if (told.get(job.id) === where) continue;
      const isNew = !told.has(job.id);
      told.set(job.id, where);
      if (!isNew || job.finished_at === null) lines.push(`${job.model}: ${where}`);
    }
    if (lines.length > 0) say(news, lines.join(". "));
  }

  setInterval(redraw(section, draw, "jobs", "session"), TICK_MS);
}

/**
 * @param {Map<string, import("./types.js").Job>} jobs the newest first
 * @returns {[string, import("./types.js").Job][]} those under way, and the last that have ended
 */
function shown(jobs) {
  const live = [...jobs].filter(([, job]) => job.finished_at === null);
  const ended = [...jobs].filter(([, job]) => job.finished_at !== null);
  return [...live, ...ended.slice(0, SHOWN)];
}

/** @type {WeakMap<Element, Record<string, HTMLElement>>} */
const parts = new WeakMap();

/**
 * @param {string} id
 * @param {import("./types.js").Job} job
 * @returns {HTMLElement}
 */
function make(id, job) {
  const made = {
    chip: h("span", { class: "chip" }),
    when: h("span", { class: "aside" }),
    stages: h("ol", { class: "stages" }, STAGES.map((stage) => h("li", {}, stage))),
    bar: h("progress", { "aria-label": `Progress of ${job.model}` }),
    about: h("p", { class: "under" }),
    fault: h("p", { class: "under bad", role: "alert" }),
  };
  const cancel = h("button", { type: "button", class: "small", "aria-label": `Cancel ${job.model}` }, "Cancel");
  cancel.addEventListener("click", () => void stop(id, cancel, made.fault));
  const element = h(
    "li",
    { dataset: { job: id } },
    h("div", { class: "row" }, h("span", { class: "name" }, job.model), made.chip, made.when, cancel),
    made.stages,
    made.bar,
    made.about,
    made.fault,
  );
  parts.set(element, { ...made, cancel });
  return element;
}

/**
 * @param {string} id
 * @param {HTMLButtonElement} button
 * @param {HTMLElement} fault
 */
async function stop(id, button, fault) {
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true");
  try {
    await request("POST", `/models/jobs/${encodeURIComponent(id)}/cancel`);
    if (document.activeElement === button || button.hidden) {
      document.getElementById("jobs-title")?.focus(); // the button goes with what it has ended
    }
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    say(fault, error.message);
    button.removeAttribute("aria-disabled");
  }
}

/**
 * @param {HTMLElement} element
 * @param {import("./types.js").Job} job
 */
function update(element, job) {
  const made = /** @type {any} */ (parts.get(element));
  const live = job.finished_at === null;
  const running = job.status === "running";
  say(made.chip, job.status);
  made.chip.dataset.tone = TONES[job.status];
  say(made.when, live ? "" : ago(job.finished_at, serverNow()));
  made.cancel.hidden = !live || !isAdmin();
  made.stages.hidden = made.bar.hidden = !running;
  if (running) drawProgress(made, job);
  else fill(made.about, result(job));
  if (job.error !== null) say(made.fault, job.error.message);
}

/**
 * @param {{stages: HTMLElement, bar: HTMLProgressElement, about: HTMLElement}} made
 * @param {import("./types.js").Job} job
 */
function drawProgress(made, job) {
  const at = STAGES.indexOf(job.stage);
  for (const [index, item] of [...made.stages.children].entries()) {
    if (index === at) item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
    /** @type {HTMLElement} */ (item).dataset.past = String(index < at);
  }
  const { done_bytes: done, total_bytes: total, remaining_seconds: left } = job.progress;
  if (total > 0) {
    made.bar.max = total;
    made.bar.value = Math.min(done, total);
  } else made.bar.removeAttribute("value");
  const rest = left === null ? "" : ` · ${span(left)} left of this stage`;
  say(made.about, total > 0 ? `${bytes(done)} of ${bytes(total)}${rest}` : "");
}

/**
 * @param {import("./types.js").Job} job
 * @returns {string}
 */
function result(job) {
  const found = /** @type {any} */ (job.result);
  if (job.status !== "succeeded" || !found) return "";
  const said = [];
  if (found.bytes) said.push(`${bytes(found.bytes.unique)} of ${bytes(found.bytes.logical)} its own`);
  if (found.price) {
    const { kl, kl_upper: most } = found.price;
    said.push(`≤ ${figure(most)} nats per token, mean ${figure(kl)}`);
  }
  const seconds = Object.values(found.seconds ?? {}).reduce((sum, one) => sum + Number(one), 0);
  if (seconds > 0) said.push(`took ${span(seconds)}`);
  const why = ownFamily(found);
  return [said.join(" · "), why && `A donor of its own: ${why}`].filter(Boolean).join(". ");
}
