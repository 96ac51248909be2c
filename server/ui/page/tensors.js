/**
 * A variant's tensors as rows of blocks. Pure arithmetic.
 *
 * @typedef {object} Tensor
 * @property {string} name in its checkpoint
 * @property {string} section embed, blocks, final_norm or lm_head
 * @property {number|null} block null outside the blocks
 * @property {string} parameter such as "self_attn.q_proj.weight"
 * @property {number|null} cos
 * @property {number|null} epsilon
 * @property {string} rung
 *
 * @typedef {Omit<import("./grid.js").Row, "cells"> & {cells: (Tensor|null)[]}} TensorRow
 */
import { figure } from "./format.js";

/**
 * @param {Tensor[]} tensors
 * @returns {TensorRow[]} one of each parameter of a block, attention before what follows it
 */
export function tensorRows(tensors) {
  const inside = tensors.filter((tensor) => tensor.block !== null);
  const columns = 1 + Math.max(-1, ...inside.map((tensor) => tensor.block ?? 0));
  /** @type {Map<string, TensorRow>} */
  const rows = new Map();
  for (const tensor of inside) {
    const row = rows.get(tensor.parameter) ?? emptyRow(tensor.parameter, columns);
    row.cells[/** @type {number} */ (tensor.block)] = tensor;
    rows.set(tensor.parameter, row);
  }
  for (const row of rows.values()) row.note = mean(row);
  return [...rows.values()].sort((a, b) => rank(a.id) - rank(b.id) || (a.id < b.id ? -1 : 1));
}

/**
 * @param {TensorRow[]} rows
 * @returns {Tensor|null} the one that moved farthest
 */
export function worstOf(rows) {
  /** @type {Tensor|null} */
  let worst = null;
  for (const cell of rows.flatMap((row) => row.cells)) {
    if (cell === null || cell.epsilon === null) continue;
    if (cell.epsilon > (worst?.epsilon ?? -1)) worst = cell;
  }
  return worst;
}

/**
 * @param {string} parameter
 * @param {number} columns
 * @returns {TensorRow}
 */
function emptyRow(parameter, columns) {
  const name = parameter.replace(/\.weight$/, "").replace(/^(self_attn|mlp)\./, "");
  return { id: parameter, name, note: "", cells: Array(columns).fill(null) };
}

/**
 * @param {TensorRow} row
 * @returns {string}
 */
function mean(row) {
  const known = row.cells.flatMap((cell) => (cell?.epsilon == null ? [] : [cell.epsilon]));
  if (known.length === 0) return "";
  return figure(known.reduce((total, value) => total + value, 0) / known.length, 2);
}

/**
 * @param {string} parameter
 * @returns {number} matrices of attention, of the feed-forward part, then norms
 */
function rank(parameter) {
  if (parameter.startsWith("self_attn.")) return 0;
  return parameter.startsWith("mlp.") ? 1 : 2;
}
