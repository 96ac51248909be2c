/** Requests to the server, with the key that this tab was given. */
import { readEvents } from "./sse.js";

const KEY = "linker-key"; // of sessionStorage: it ends with the tab
/** In the words of the page; the server's are for those who write requests. */
const REFUSALS = {
  401: "This key is not known. It may have been mistyped, or revoked.",
  403: "This key may not do that.",
};

let aheadMs = 0; // the server's clock before this machine's

/** What the server said no with, or that it said nothing (status 0). */
export class ApiError extends Error {
  /**
   * @param {number} status of HTTP; 0: there was no answer
   * @param {{code?: string, message?: string, param?: string|null}} fault
   */
  constructor(status, fault) {
    super(fault.message ?? `The server answered ${status}.`);
    this.name = "ApiError";
    this.status = status;
    this.code = fault.code ?? "unknown";
    this.param = fault.param ?? null;
  }
}

/** @returns {string|null} */
export function key() {
  return sessionStorage.getItem(KEY);
}

/** @param {string|null} value null forgets it */
export function setKey(value) {
  if (value === null) sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, value);
}

/** @returns {number} seconds since the epoch by the server's clock, as near as its answers tell */
export function serverNow() {
  return (Date.now() + aheadMs) / 1000;
}

/**
 * @param {string} id of a model, perhaps with slashes
 * @returns {string} the path of its record
 */
export function modelPath(id) {
  return `/models/${id.split("/").map(encodeURIComponent).join("/")}`;
}

/**
 * Asks the server for JSON.
 *
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body] sent as JSON
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>}
 * @throws {ApiError} it said no, or nothing
 */
export async function request(method, path, body, signal) {
  const response = await open(method, path, body, signal);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw cutOff(); // or it is a proxy's page
  }
}

/**
 * Asks the server for events and yields each one's object until [DONE].
 *
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body]
 * @param {AbortSignal} [signal]
 * @returns {AsyncGenerator<any>}
 * @throws {ApiError} it said no, or nothing, or broke off; also from the midst of the stream
 */
export async function* stream(method, path, body, signal) {
  const response = await open(method, path, body, signal);
  try {
    for await (const data of readEvents(response)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(response.status, event.error);
      yield event;
    }
  } catch (error) {
    if (error instanceof ApiError || signal?.aborted) throw error;
    throw unreachable();
  }
  throw cutOff();
}

/**
 * @param {string} method
 * @param {string} path
 * @param {unknown} body
 * @param {AbortSignal|undefined} signal
 * @returns {Promise<Response>} with a status of success
 */
async function open(method, path, body, signal) {
  /** @type {Record<string, string>} */
  const headers = {};
  const shown = key();
  if (shown !== null) headers.Authorization = `Bearer ${shown}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const sent = body === undefined ? undefined : JSON.stringify(body);
  /** @type {Response} */
  let response;
  try {
    response = await fetch(path, { method, headers, body: sent, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw unreachable();
  }
  const date = Date.parse(response.headers.get("Date") ?? "");
  if (!Number.isNaN(date)) aheadMs = date - Date.now();
  if (response.ok) return response;
  const fault = await faultOf(response);
  if (response.status === 401) {
    const message = shown === null ? "This server asks for a key." : REFUSALS[401];
    document.dispatchEvent(new CustomEvent("keyrefused", { detail: message }));
    throw new ApiError(401, { ...fault, message });
  }
  const isRole = fault.code === "permission_denied" && fault.param == null;
  throw new ApiError(response.status, isRole ? { ...fault, message: REFUSALS[403] } : fault);
}

/**
 * @param {Response} response
 * @returns {Promise<{code?: string, message?: string, param?: string|null}>}
 */
async function faultOf(response) {
  try {
    return (await response.json()).error ?? {};
  } catch {
    return {}; // a proxy's page, or cut off
  }
}

/** @returns {ApiError} */
function unreachable() {
  return new ApiError(0, { code: "unreachable", message: "The server cannot be reached." });
}

/** @returns {ApiError} */
function cutOff() {
  return new ApiError(0, { code: "cut_off", message: "The server broke off its answer." });
}
