/** Numbers as people read them. An unknown number is a dash. */

const UNKNOWN = "–";
const SIZES = ["B", "KiB", "MiB", "GiB", "TiB"];

/**
 * @param {number|null|undefined} value in bytes
 * @returns {string} such as "1.4 GiB"
 */
export function bytes(value) {
  if (value === null || value === undefined) return UNKNOWN;
  let size = Math.abs(value);
  let unit = 0;
  while (size >= 1023.5 && unit < SIZES.length - 1) {
    size /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || size >= 99.5 ? 0 : 1;
  return `${value < 0 ? "−" : ""}${size.toFixed(digits)} ${SIZES[unit]}`;
}

/**
 * @param {number|null|undefined} ratio of 1
 * @param {number} [digits]
 * @returns {string} such as "83 %"
 */
export function percent(ratio, digits = 0) {
  if (ratio === null || ratio === undefined || !Number.isFinite(ratio)) return UNKNOWN;
  return `${(100 * ratio).toFixed(digits)} %`;
}

/**
 * @param {number|null|undefined} value
 * @param {number} [digits] significant ones
 * @returns {string} such as "0.00417"
 */
export function figure(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return UNKNOWN;
  if (value === 0) return "0";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return Math.abs(value) < 1e-4 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}

/**
 * @param {number} value
 * @param {number|null} limit that it is held against
 * @returns {string} with as many digits as tell it from the limit
 */
export function beside(value, limit) {
  let digits = 3;
  while (digits < 8 && value !== limit && figure(value, digits) === figure(limit)) digits += 1;
  return figure(value, digits);
}

/**
 * @param {number|null|undefined} value a price, nats per token
 * @returns {string} such as "0.0060"; prices stand below each other, so they have equal digits
 */
export function nats(value) {
  if (value === null || value === undefined) return UNKNOWN;
  return value === 0 || Math.abs(value) >= 0.00005 ? value.toFixed(4) : value.toExponential(0);
}

/**
 * @param {number|null|undefined} seconds a span
 * @returns {string} such as "3 min 20 s"
 */
export function span(seconds) {
  if (seconds === null || seconds === undefined) return UNKNOWN;
  if (seconds < 0.9995) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/**
 * @param {number|null|undefined} time seconds since the epoch
 * @param {number} now likewise
 * @returns {string} such as "5 min ago"
 */
export function ago(time, now) {
  if (time === null || time === undefined) return "never";
  const age = Math.max(now - time, 0);
  if (age < 10) return "just now";
  if (age < 60) return `${Math.floor(age)} s ago`;
  if (age < 3600) return `${Math.floor(age / 60)} min ago`;
  if (age < 86_400) return `${Math.floor(age / 3600)} h ago`;
  return `${Math.floor(age / 86_400)} d ago`;
}

/**
 * @param {number} count
 * @param {string} one
 * @param {string} [many]
 * @returns {string} such as "2 models"
 */
export function counted(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}
