/** The section of one family's study: how far it is, and the main of what it found. */
import { serverNow } from "./api.js";
import { attribute, fill, h, say } from "./dom.js";
import { nothing } from "./figure.js";
import { ago, counted, figure, percent } from "./format.js";
import { redraw } from "./redraw.js";
import { chooseFamily, families, shownStudy } from "./studies.js";

/** @typedef {import("./types.js").Study} Study */

const TONES = { waiting: "quiet", running: "plain", done: "good", failed: "bad" };
const EMPTY = "Two fine-tunes of a model are studied once they have been onboarded: what their weights"
  + " have in common, and which of them stand apart.";

/**
 * @param {HTMLElement} section
 * @param {import("./store.js").Store} store
 */
export function mount(section, store) {
  const empty = nothing(EMPTY);
  const fault = h("p", { class: "bad", role: "alert" });
  const select = h("select", { on: { change: () => chooseFamily(select.value) } });
  const chooser = h("div", { class: "tools" }, h("label", { class: "chooser" }, "Family", select));
  const chip = h("span", { class: "chip" });
  const about = h("span", { role: "status" });
  const bar = h("progress", { "aria-label": "Progress of the study" });
  const trouble = h("p", { class: "under bad" });
  const notes = h("p", { class: "figure-note" });
  const tiles = h("dl", { class: "tiles" });
  const body = h("div", {}, chooser,
    h("p", { class: "study-state" }, chip, " ", about), bar, trouble, notes, tiles);
  section.append(empty, fault, body);

  redraw(section, () => {
    const study = shownStudy();
    empty.hidden = study !== null || store.studiesFault !== null || !store.told.has("studies");
    body.hidden = study === null;
    say(fault, store.studiesFault ?? "");
    if (study === null) return;
    offer(select, study.family);
    chooser.hidden = select.options.length < 2;
    chip.dataset.tone = TONES[study.state];
    say(chip, study.state);
    say(about, words(study));
    drawProgress(bar, study);
    say(trouble, troubles(study));
    say(notes, copies(study));
    drawTiles(tiles, study);
  }, "studies");
}

/**
 * @param {HTMLSelectElement} select
 * @param {string} shown
 */
function offer(select, shown) {
  const names = families();
  if (!names.includes(shown)) names.push(shown);
  const known = [...select.options].map((option) => option.value);
  if (known.length !== names.length || known.some((name) => !names.includes(name))) {
    fill(select, names.map((name) => h("option", { value: name }, name)));
  }
  select.value = shown;
}

/**
 * @param {Study} study
 * @returns {string} how far it is, and how old what is shown is
 */
function words(study) {
  const said = [];
  if (study.state === "running" && study.progress !== null) {
    const { done_tensors: done, total_tensors: total } = study.progress;
    said.push(total ? `${done} of ${counted(total, "tensor")}` : "opening the checkpoints");
  }
  if (study.reason !== null) said.push(study.reason);
  const { summary } = study;
  if (summary !== null) {
    const what = `${counted(summary.num_tensors, "tensor")} of`
      + ` ${counted(Object.keys(summary.variants).length, "fine-tune")}`;
    const when = ago(study.finished_at, serverNow());
    said.push(`${what}, studied ${when}${study.is_current ? "" : ", before its models changed"}`);
  }
  return said.join(" · ");
}

/**
 * @param {HTMLProgressElement} bar
 * @param {Study} study
 */
function drawProgress(bar, { state, progress }) {
  bar.hidden = state !== "running";
  if (progress?.total_tensors) {
    bar.max = progress.total_tensors;
    bar.value = progress.done_tensors;
  } else attribute(bar, "value", null);
}

/**
 * @param {Study} study
 * @returns {string}
 */
function copies({ same_weights: same }) {
  return Object.entries(same)
    .map(([name, of]) => `${name} has the weights of ${of} and is counted once.`).join(" ");
}

/**
 * @param {Study} study
 * @returns {string}
 */
function troubles({ error, left_out: leftOut }) {
  const reasons = Object.values(leftOut).map((why) => why.message); // each names its fine-tune
  const said = error === null || reasons.includes(error.message) ? [] : [error.message];
  return [...said, ...reasons.map((reason) => `Left out: ${reason}`)].join(" ");
}

/**
 * @param {HTMLElement} tiles
 * @param {Study} study
 */
function drawTiles(tiles, { summary }) {
  tiles.hidden = summary === null;
  if (summary === null) return;
  const shown = [
    direction(summary),
    { name: "Pairwise cosine", value: figure(summary.pairwise_cosine.mean),
      note: "between what two fine-tunes added; 0 is unrelated" },
    { name: "Signal to noise", value: figure(summary.components.all?.snr),
      note: "norm of the mean over what they differ from it by" },
    { name: "Tensors beyond their null",
      value: percent(summary.components.all?.significant_share_centred),
      note: "by their centred PC1, corrected for how many are tested" },
    { name: "Kernel's acceptance", value: percent(summary.kernel?.acceptance_ratio),
      note: "of the sampler that weighs its tensors" },
  ];
  fill(tiles, shown.map(({ name, value, note }) =>
    h("div", { class: "tile" }, h("dt", {}, name),
      h("dd", { class: "tile-value" }, value), h("dd", { class: "tile-note" }, note))));
}

/**
 * @param {import("./types.js").StudySummary} summary
 * @returns {{name: string, value: string, note: string}} PC1 beside its null, which two
 *   fine-tunes have not
 */
function direction({ components, shared_fraction: shared }) {
  const all = components.all;
  if (all?.pc1_centred != null && all.null95_centred !== null) {
    return { name: "PC1, centred", value: percent(all.pc1_centred, 1),
      note: `its null: 95 % are below ${percent(all.null95_centred, 1)}` };
  }
  return { name: "Shared fraction", value: percent(shared?.mean, 1),
    note: "two fine-tunes have no PC1 that says anything" };
}
