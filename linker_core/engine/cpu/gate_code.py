"""Emits the gate of an MLP: gate = activation(gate) · up, in place.

Legend: T rows, I elements of a row.
"""

from __future__ import annotations

from llvmlite import ir

from linker_core.engine.cpu.emitter import F32, I64, POINTER, Emitter, i64, vector
from linker_core.engine.cpu.vector_math import normal_cdf, sigmoid

_PIECE = 1024  # elements that a thread takes at a time

# 64-bit words of the record that a region is called with.
TASK = (
    "gate",
    "gate_stride",  # elements between rows
    "up",
    "up_stride",
    "num_rows",
    "width",  # I
    "next_piece",  # 0; counted up by the threads
)
_TASK = {name: number for number, name in enumerate(TASK)}
# GELU's tanh form: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))) = x sigmoid(2 sqrt(2 / pi) …)
_GELU_SCALE, _GELU_CUBE = 1.5957691216057308, 0.044715


def emit_gate(module: ir.Module, *, activation: str, lanes: int) -> None:
    """Adds `gate_{activation}`, to be called on every thread of a region with a task's address."""
    e = Emitter(module, f"gate_{activation}", [POINTER])
    b, (task,) = e.builder, e.arguments
    gate, up = (e.field(task, _TASK[key], POINTER) for key in ("gate", "up"))
    gate_stride, up_stride, num_rows, width = (
        e.field(task, _TASK[key]) for key in ("gate_stride", "up_stride", "num_rows", "width")
    )
    per_row = b.sdiv(e.round_up(width, _PIECE), i64(_PIECE))

    def one(target: ir.Value, source: ir.Value, lanes: int) -> None:
        x = e.load(target, vector(F32, lanes))
        opened = _activated(e, activation, x)
        e.store(b.fmul(opened, e.load(source, x.type)), target)

    counter = e.at(task, _TASK["next_piece"], I64)
    with e.taken(counter, b.mul(per_row, num_rows)) as number:
        row, start = b.sdiv(number, per_row), b.mul(b.srem(number, per_row), i64(_PIECE))
        target = e.at(gate, b.add(b.mul(row, gate_stride), start), F32)
        source = e.at(up, b.add(b.mul(row, up_stride), start), F32)
        count = e.minimum(_PIECE, b.sub(width, start))
        whole = e.round_down(count, lanes)
        with e.loop(0, whole, lanes) as k:
            one(e.at(target, k, F32), e.at(source, k, F32), lanes)
        with e.loop(whole, count) as k:
            one(e.at(target, k, F32), e.at(source, k, F32), 1)
    e.finish()


def _activated(e: Emitter, activation: str, x: ir.Value) -> ir.Value:
    b = e.builder
    if activation == "silu":
        return b.fmul(x, sigmoid(e, x))
    if activation == "relu":
        return e.maximum(e.constant(0.0, x), x)
    if activation == "gelu":
        return b.fmul(x, normal_cdf(e, x))
    assert activation == "gelu_pytorch_tanh"
    cubic = b.fmul(b.fmul(b.fmul(x, x), x), e.constant(_GELU_CUBE, x))
    scaled = b.fmul(b.fadd(x, cubic), e.constant(_GELU_SCALE, x))
    return b.fmul(x, sigmoid(e, scaled))
