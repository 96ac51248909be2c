/** The fields of POST /models: which are shown, what they make of a body, where faults belong. */
import { checkField, choiceField, offer, textField } from "./fields.js";
import { h } from "./dom.js";
import { ApiError } from "./api.js";
import { store, subscribe } from "./store.js";

/**
 * Options by policy; "" is what the server's settings say, which takes none.
 *
 * @type {Record<string, string[]>}
 */
const OPTIONS = {
  "": [],
  budget: ["budget_kl"],
  thresholds: ["tau_cos", "tau_frob", "tier", "budget_kl"],
  bytes: ["max_bytes"],
  exact: [],
};
const POLICIES = /** @type {[string, string][]} */ ([
  ["", "As the server is set"],
  ["budget", "Budget: fewest bytes within a price"],
  ["bytes", "Bytes: best price within a size"],
  ["thresholds", "Thresholds: share what is close"],
  ["exact", "Exact: share equal bytes alone"],
]);
/**
 * What is a number or a size, and how it is written.
 *
 * @type {Record<string, string>}
 */
const FORMS = {
  budget_kl: "A number of nats, such as 0.01.",
  tau_cos: "A number from -1 to 1, such as 0.999.",
  tau_frob: "A number, such as 0.05.",
  max_bytes: "A number of bytes, such as 64M or 1.5G.",
};
const UNITS = { "": 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };

const CHECKPOINTS = new Set(["bad_checkpoint", "unsupported_format"]);

/** Makes the fields. */
export function onboardFields() {
  const number = { inputmode: "decimal" };
  const named = {
    name: textField("onboard-name", "Name", { required: true, placeholder: "acme/chat" }),
    source: textField("onboard-source", "Source", {
      required: true,
      placeholder: "/models/acme-chat",
      hint: "A folder on the server, or hub:ORG/NAME@REVISION",
    }),
    donor: choiceField("onboard-donor", "Donor", [["", "Closest, or none"]]),
    policy: choiceField("onboard-policy", "Policy", POLICIES),
    budget_kl: textField("onboard-budget", "Budget", { ...number, placeholder: "0.01", hint: "Nats per response token" }),
    max_bytes: textField("onboard-bytes", "At most", { placeholder: "64M", hint: "Bytes, or with K, M, G" }),
    tau_cos: textField("onboard-cos", "Least cosine", { ...number, placeholder: "0.999" }),
    tau_frob: textField("onboard-frob", "Largest ε", { ...number, placeholder: "0.05" }),
    tier: textField("onboard-tier", "Or a tier", { placeholder: "Qwen2.5-7B" }),
    revision: textField("onboard-revision", "Revision", { hint: "Of a source on the hub that names none" }),
    keep_alive: textField("onboard-stay", "Keep alive", {
      placeholder: "5m",
      hint: "Without requests; negative: for ever",
    }),
  };
  const pin = checkField("onboard-pin", "Pin: never evict it, and load it at every start");
  /** @type {Record<string, import("./fields.js").Field>} */
  const byParam = named;

  function show() {
    const shown = OPTIONS[named.policy.input.value];
    for (const option of new Set(Object.values(OPTIONS).flat())) {
      byParam[option].element.hidden = !shown.includes(option);
    }
  }

  function donors() {
    const known = [...store.models.values()].filter((model) => model.donor === null);
    const options = known.map((model) => /** @type {[string, string]} */ ([model.id, model.id]));
    offer(/** @type {HTMLSelectElement} */ (named.donor.input), [["", "Closest, or none"], ...options]);
  }

  named.policy.input.addEventListener("change", show);
  subscribe((topics) => {
    if (topics.has("models")) donors();
  });
  show();
  donors();
  const more = h("details", {}, h("summary", {}, "More"), h("div", { class: "stack" }, [
    h("div", { class: "grid" }, named.revision.element, named.keep_alive.element),
    pin.element,
  ]));
  for (const { element } of [named.name, named.source]) element.classList.add("wide");
  const first = [named.name, named.source, named.donor, named.policy].map((field) => field.element);
  const options = [...new Set(Object.values(OPTIONS).flat())].map((one) => byParam[one].element);
  return {
    byParam,
    show,
    elements: [h("div", { class: "grid" }, first, options), more],
    /**
     * Says which fields have to be filled in.
     *
     * @param {...string} params
     * @returns {boolean} whether they are
     */
    have(...params) {
      const missing = params.map((one) => byParam[one]).filter((field) => field.input.value.trim() === "");
      for (const field of missing) field.complain("Fill this in.");
      missing[0]?.input.focus();
      return missing.length === 0;
    },
    /** @returns {boolean} whether numbers and sizes are such; says where they are not */
    areReadable() {
      const wrong = Object.entries(byParam).filter(([param, { element, input }]) => {
        const text = input.value.trim();
        return text !== "" && !element.hidden && typeof valueOf(param, text) === "string" && param in FORMS;
      });
      for (const [param, field] of wrong) field.complain(FORMS[param]);
      wrong[0]?.[1].input.focus();
      return wrong.length === 0;
    },
    /** Takes back what was wrong. */
    clear: () => Object.values(byParam).forEach((field) => field.complain(null)),
    /** @returns {Record<string, unknown>} what is filled in, as the server takes it */
    body() {
      /** @type {Record<string, unknown>} */
      const body = pin.input.checked ? { pin: true } : {};
      for (const [param, field] of Object.entries(byParam)) {
        const text = field.input.value.trim();
        if (text !== "" && !field.element.hidden) body[param] = valueOf(param, text);
      }
      return body;
    },
  };
}

/**
 * @param {ApiError} error
 * @param {Record<string, import("./fields.js").Field>} byParam
 * @returns {{field: import("./fields.js").Field|null, message: string}} null: about none that is shown
 */
export function faultOf(error, byParam) {
  // A checkpoint is the source's, unless a donor was named whose it may be as well.
  const isSource = CHECKPOINTS.has(error.code) && byParam.donor.input.value === "";
  const field = byParam[error.param ?? (isSource ? "source" : "")] ?? null;
  const isShown = field !== null && !field.element.hidden;
  return { field: isShown ? field : null, message: inLabels(error.message, byParam) };
}

/**
 * @param {string} message
 * @param {Record<string, import("./fields.js").Field>} byParam
 * @returns {string} with fields called as they are here
 */
function inLabels(message, byParam) {
  const params = Object.keys(byParam).filter((param) => param.includes("_")); // others are words
  return message.replaceAll(new RegExp(`\\b(${params.join("|")})\\b`, "g"), (param) => {
    return byParam[param].element.querySelector("label")?.textContent ?? param;
  });
}

/**
 * @param {string} param
 * @param {string} text
 * @returns {unknown} as text where it is no number
 */
function valueOf(param, text) {
  if (param === "max_bytes") {
    const size = /^(\d+\.?\d*|\.\d+)\s*([KMGT]?)(?:i?B)?$/i.exec(text);
    if (size === null) return text;
    return Math.round(Number(size[1]) * UNITS[/** @type {keyof typeof UNITS} */ (size[2].toUpperCase())]);
  }
  const isNumber = ["budget_kl", "tau_cos", "tau_frob", "keep_alive"].includes(param);
  return isNumber && Number.isFinite(Number(text)) ? Number(text) : text;
}
