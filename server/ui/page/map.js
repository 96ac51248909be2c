/** The section of memory: what is saved, what lies on the device, and what each variant holds. */
import { fill, h, say } from "./dom.js";
import { Figure, nothing, swatch } from "./figure.js";
import { bytes, counted, percent } from "./format.js";
import { byFamily, deviceParts, kindsOf, largestFamily, residents, totals } from "./memory.js";
import { giveColours, kindToken, modelColour } from "./palette.js";
import { redraw } from "./redraw.js";
import { growthLines, kindName, kindPattern, kinds, weights } from "./stacks.js";

/** @typedef {import("./memory.js").Sized} Sized */

const NAMED = 16; // more models than this are named when they are pointed at, and in the table

/**
 * @param {HTMLElement} section
 * @param {import("./store.js").Store} store
 */
export function mount(section, store) {
  const tiles = h("dl", { class: "tiles", hidden: true });
  const device = h("div", { class: "device" });
  const empty = nothing("No model is resident yet. What models share appears here once they are.");
  const copies = new Figure({
    title: "Weights, and what separate copies would take",
    about: "The same models twice: each as a copy of its own, and as they lie on the device.",
  });
  const rungs = new Figure({
    title: "What each variant holds to itself",
    about: "By kind: residuals are compressed differences from the donor.",
  });
  const scaling = new Figure({
    title: "Memory against the number of models",
    about: "Of the largest family; dotted where it leads with more variants like these.",
  });
  const pair = h("div", { class: "charts-pair", hidden: true }, rungs.element, scaling.element);
  section.append(tiles, device, empty, copies.element, pair);

  redraw(section, () => {
    tiles.hidden = !store.told.has("models");
    const here = residents(store.models.values());
    drawTiles(tiles, here, store);
    drawDevice(device, store.status?.device ?? null, totals(here).unique);
  }, "models", "status");
  redraw(section, () => {
    giveColours(store.models.values());
    const here = residents(store.models.values());
    empty.hidden = here.length > 0 || !store.told.has("models");
    copies.element.hidden = here.length === 0;
    const variants = here.filter((model) => model.donor !== null);
    pair.hidden = variants.length === 0;
    if (here.length > 0) drawCopies(copies, here);
    if (variants.length > 0) {
      drawRungs(rungs, variants);
      drawScaling(scaling, largestFamily(here));
    }
  }, "models", "theme");
}

/**
 * @param {HTMLElement} tiles
 * @param {Sized[]} here
 * @param {import("./store.js").Store} store
 */
function drawTiles(tiles, here, store) {
  const device = store.status?.device ?? null;
  const { unique, separate, saved, ratio } = totals(here, device);
  const donors = here.filter((model) => model.donor === null).length;
  const known = store.models.size;
  const shown = [
    ["Saved", bytes(saved), `${percent(ratio)} of separate copies`],
    ["Models on the device", String(here.length),
      `${counted(donors, "donor")}, ${counted(here.length - donors, "variant")}; ${known} known`],
    ["Their weights", bytes(unique), `${bytes(separate)} as separate copies`],
    ["Free", bytes(device?.free), device === null ? "" : `of a budget of ${bytes(device.budget)}`],
  ];
  if (tiles.childElementCount !== shown.length) {
    fill(tiles, shown.map(([name]) => h("div", { class: "tile" },
      h("dt", {}, name), h("dd", { class: "tile-value" }), h("dd", { class: "tile-note" }))));
  }
  /** @type {HTMLElement} */ (tiles.children[0]).dataset.tone = saved > 0 ? "good" : "";
  for (const [index, [, value, note]] of shown.entries()) {
    const [, valueAt, noteAt] = tiles.children[index].children;
    say(valueAt, value);
    say(noteAt, note);
  }
}

/**
 * @param {HTMLElement} place
 * @param {import("./types.js").Status["device"]} device
 * @param {number} unique what the models hold together, in bytes
 */
function drawDevice(place, device, unique) {
  place.hidden = device === null;
  if (device === null) return;
  const parts = deviceParts(device, unique);
  const words = parts.map(({ name, size }) => `${name} ${bytes(size)}`).join(", ");
  if (place.dataset.words === words) return;
  place.dataset.words = words;
  const bar = h("div", { class: "device-bar", role: "img",
    "aria-label": `Memory of the device (${device.name}), ${bytes(device.budget)}: ${words}` });
  for (const { token, name, size } of parts) {
    if (size <= 0) continue;
    const part = h("span", { title: `${name}: ${bytes(size)}` });
    part.style.flexGrow = String(size);
    part.style.backgroundColor = `var(${token})`;
    bar.append(part);
  }
  fill(place, h("h3", { class: "figure-title" }, `Memory of the device (${device.name})`), bar,
    h("ul", { class: "legend" }, parts.map(({ token, name, size }) =>
      h("li", {}, swatch(token), `${name} `, h("b", {}, bytes(size))))));
}

/**
 * @param {Figure} figure
 * @param {Sized[]} here
 */
function drawCopies(figure, here) {
  const { unique, separate, saved, ratio } = totals(here);
  figure.show({
    label: `${counted(here.length, "model")} ${here.length === 1 ? "holds" : "hold"}`
      + ` ${bytes(unique)}; separate copies would take`
      + ` ${bytes(separate)}. ${bytes(saved)}, ${percent(ratio)}, are saved.`,
    make: weights(here),
    legend: here.length > NAMED ? [] : here.map((model) => {
      const { token, pattern } = modelColour(model);
      return { token, pattern, name: model.donor === null ? `${model.id} (donor)` : model.id };
    }),
    table: () => ({
      headers: ["Model", "Separate copy", "Its own", "Shared", "Saved", "Saved %"],
      rows: [...here].sort(byFamily).map(({ id, bytes: size }) =>
        [id, bytes(size.logical), bytes(size.unique), bytes(size.shared), bytes(size.saved),
          percent(size.saved / size.logical, 1)]),
    }),
  });
}

/**
 * @param {Figure} figure
 * @param {Sized[]} variants
 */
function drawRungs(figure, variants) {
  const found = kindsOf(variants);
  const most = [...variants].sort((a, b) => b.bytes.unique - a.bytes.unique)[0];
  figure.show({
    label: `${counted(variants.length, "variant")} by kind of rung; ${most.id} holds most,`
      + ` ${bytes(most.bytes.unique)}.`,
    make: kinds(variants, found),
    legend: found.map((kind) =>
      ({ token: kindToken(kind), pattern: kindPattern(kind), name: kindName(kind) })),
    table: () => ({
      headers: ["Variant", ...found.map(kindName), "Together"],
      rows: variants.map((model) => [model.id,
        ...found.map((kind) => bytes(model.plan?.rung_bytes[kind] ?? 0)),
        bytes(model.bytes.unique)]),
    }),
  });
}

/**
 * @param {Figure} figure
 * @param {Sized[]} family
 */
function drawScaling(figure, family) {
  const until = Math.max(8, 2 * family.length);
  const { unique, separate } = totals(family);
  figure.show({
    label: `With ${counted(family.length, "model")}: ${bytes(unique)} with sharing,`
      + ` ${bytes(separate)} as separate copies.`,
    make: growthLines(family, until),
    table: () => {
      let [shared, apart] = [0, 0];
      return {
        headers: ["Up to", "With sharing", "Separate copies", "Saved %"],
        rows: family.map((model, index) => {
          shared += model.bytes.unique;
          apart += model.bytes.logical;
          return [`${index + 1}: ${model.id}`, bytes(shared), bytes(apart),
            percent(1 - shared / apart, 1)];
        }),
      };
    },
  });
}
