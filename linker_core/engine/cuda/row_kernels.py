"""Norms and gates of rows, in Triton; arithmetic in float32 whatever the rows' type.

Legend: T rows of the batch, X elements of a row, W elements that are normalised together, I
intermediate size, V distinct weights.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalize_runs(
    x_TX,
    x_stride,
    out_TX,
    out_stride,
    weights,
    labels_T,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BY_ROW: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
):
    """One run of W elements of one row.

    `weights` is the weight of all rows; or, if they differ by row, the addresses [V] of weights of
    one type, of which `labels_T` names every row's.
    """
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = tl.arange(0, BLOCK)
    inside = places < WIDTH
    x_W = tl.load(x_TX + row * x_stride + run * WIDTH + places, mask=inside, other=0.0)
    x_W = x_W.to(tl.float32)
    if BY_ROW:
        address = tl.load(weights + tl.load(labels_T + row))
        weight_ptr = address.to(tl.pointer_type(WEIGHT_TYPE))
    else:
        weight_ptr = weights
    factor_W = tl.load(weight_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if PLUS_ONE:
        factor_W += 1.0
    scale = 1.0 / tl.sqrt(tl.sum(x_W * x_W, axis=0) / WIDTH + eps)
    out_W = (x_W * scale * factor_W).to(out_TX.dtype.element_ty)
    tl.store(out_TX + row * out_stride + run * WIDTH + places, out_W, mask=inside)


@triton.jit
def gate_rows(
    gate_TI,
    gate_stride,
    up_TI,
    up_stride,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrites a stretch of a row's gate by activation(gate) · up."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < width
    gate_ptr = gate_TI + row * gate_stride + places
    x = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_TI + row * up_stride + places, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        steepness = x
        if ACTIVATION == "gelu_pytorch_tanh":
            steepness = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        # The logistic function of both signs, without an exponential that overflows.
        fallen = tl.exp(-tl.abs(steepness))
        share = tl.where(steepness < 0.0, fallen, 1.0) / (1.0 + fallen)
    tl.store(gate_ptr, (x * share * up).to(gate_TI.dtype.element_ty), mask=inside)
