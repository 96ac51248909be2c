/** The form that onboards a model, or asks what that would share, cost and take. */
import { ApiError, request } from "./api.js";
import { drawDryRun } from "./dry_run.js";
import { attribute, fill, h, say } from "./dom.js";
import { ownFamily } from "./model_cells.js";
import { faultOf, onboardFields } from "./onboard_fields.js";
import { changed, isAdmin, store, subscribe } from "./store.js";

/** @param {HTMLElement} section */
export function mount(section) {
  const head = /** @type {HTMLElement} */ (section.querySelector(".card-head"));
  const update = () => {
    section.hidden = !isAdmin();
    if (!isAdmin()) fill(section, head); // nothing of it is there
    else if (section.childElementCount === 1) section.append(form());
  };
  subscribe((topics) => {
    if (topics.has("session")) update();
  });
  update();
}

/** @returns {HTMLElement} */
function form() {
  const fields = onboardFields();
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const said = h("p", { class: "under", role: "status" });
  const found = h("div", { class: "found", role: "region", "aria-label": "Dry run", hidden: true });
  const rehearse = h("button", { type: "button" }, "Dry run");
  const go = h("button", { class: "primary" }, "Onboard");
  const stop = h("button", { type: "button", class: "quiet", hidden: true }, "Stop");
  /** @type {AbortController|null} */
  let running = null;
  /** @type {string|null} the job that was begun here last, until it has ended */
  let awaited = null;

  /**
   * @param {(body: Record<string, unknown>, signal: AbortSignal) => Promise<void>} work
   * @param {string} what is said meanwhile
   * @param {...string} needed
   */
  async function run(work, what, ...needed) {
    if (running !== null) return;
    clear();
    if (!fields.have(...needed) || !fields.areReadable()) return;
    running = new AbortController();
    busy(true, what);
    try {
      await work(fields.body(), running.signal);
    } catch (error) {
      if (error instanceof ApiError) complain(error);
      else if (!running.signal.aborted) throw error;
    } finally {
      running = null;
      busy(false, "");
    }
  }

  /**
   * @param {boolean} is
   * @param {string} what
   */
  function busy(is, what) {
    for (const button of [go, rehearse]) attribute(button, "aria-disabled", is || null);
    stop.hidden = !is;
    if (is) say(said, what);
    else if (said.textContent?.endsWith("…")) say(said, "");
  }

  /** Says how the job that was begun here has ended. */
  function tell() {
    const job = awaited === null ? undefined : store.jobs.get(awaited);
    if (job === undefined || job.finished_at === null) return;
    awaited = null;
    say(said, ending(job));
  }

  function clear() {
    awaited = null;
    say(said, "");
    fields.clear();
    fault.hidden = true;
    found.hidden = true;
  }

  /** @param {ApiError} error shown at its field where it is about one */
  function complain(error) {
    const { field, message } = faultOf(error, fields.byParam);
    if (field !== null) {
      field.element.closest("details")?.setAttribute("open", "");
      field.complain(message);
      field.input.focus();
      return;
    }
    say(fault, message);
    fault.hidden = false;
  }

  const dryRun = () =>
    run(async ({ name, pin, keep_alive: stay, ...body }, signal) => {
      const plan = await request("POST", "/models/plan", body, signal);
      drawDryRun(found, plan);
      found.hidden = false;
      say(said, "The dry run has ended.");
    }, "Scanning and pricing; nothing is loaded…", "source");

  const onboard = () =>
    run(async (body, signal) => {
      const job = await request("POST", "/models", body, signal);
      if (!store.jobs.has(job.id)) store.jobs.set(job.id, job); // else an event said more already
      element.reset();
      fields.show();
      const isDone = job.finished_at !== null; // it was there before
      say(said, `${job.model} is ${isDone ? "there already" : "being onboarded"}.`);
      awaited = isDone ? null : job.id;
      changed("jobs");
    }, "Checking the source…", "name", "source");

  subscribe((topics) => {
    if (topics.has("jobs")) tell();
  });
  rehearse.addEventListener("click", () => void dryRun());
  stop.addEventListener("click", () => running?.abort());
  const element = h("form", { class: "stack", novalidate: true }, fields.elements, fault);
  element.append(h("div", { class: "row" }, go, rehearse, stop, said), found);
  element.addEventListener("submit", (event) => {
    event.preventDefault();
    void onboard();
  });
  return element;
}

/**
 * @param {import("./types.js").Job} job that has ended
 * @returns {string}
 */
function ending({ model, status, error, result }) {
  if (status === "failed") return `${model} was not onboarded: ${error?.message ?? "see its job."}`;
  if (status === "cancelled") return `${model} was not onboarded: its job was cancelled.`;
  const why = ownFamily(result ?? {});
  return `${model} is onboarded.${why === null ? "" : ` It is a donor of its own: ${why}`}`;
}
