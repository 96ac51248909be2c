"""Emits the sum of two tensors of rows, in place: x += y.

Legend: T rows, H elements of a row.
"""

from __future__ import annotations

from llvmlite import ir

from linker_core.engine.cpu.emitter import F32, POINTER, Emitter, i64, vector

# 64-bit words of the record that a region is called with.
TASK = ("x", "x_stride", "y", "y_stride", "num_rows", "width")
_TASK = {name: number for number, name in enumerate(TASK)}


def emit_add(module: ir.Module, *, lanes: int) -> None:
    """Adds `add`, to be called on every thread of a region with a task's address."""
    e = Emitter(module, "add", [POINTER])
    b, (task,) = e.builder, e.arguments
    x, y = (e.field(task, _TASK[key], POINTER) for key in ("x", "y"))
    x_stride, y_stride, num_rows, width = (
        e.field(task, _TASK[key]) for key in ("x_stride", "y_stride", "num_rows", "width")
    )

    def one(target: ir.Value, source: ir.Value, lanes: int) -> None:
        total = e.load(target, vector(F32, lanes))
        e.store(b.fadd(total, e.load(source, total.type)), target)

    thread, num_threads = e.thread_number(), e.num_threads()
    first = b.sdiv(b.mul(num_rows, thread), num_threads)
    stop = b.sdiv(b.mul(num_rows, b.add(thread, i64(1))), num_threads)
    whole = e.round_down(width, lanes)
    with e.loop(first, stop) as row:
        target = e.at(x, b.mul(row, x_stride), F32)
        source = e.at(y, b.mul(row, y_stride), F32)
        with e.loop(0, whole, lanes) as k:
            one(e.at(target, k, F32), e.at(source, k, F32), lanes)
        with e.loop(whole, width) as k:
            one(e.at(target, k, F32), e.at(source, k, F32), 1)
    e.finish()
