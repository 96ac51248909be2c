"""Emits RMSNorm of float32 rows over weights' stored words: out = x / sqrt(mean(x²) + eps) · w.

A row may hold several vectors one behind the other, each normalised alone (the heads of a query).
Vectors are dealt out to the threads; a vector's sum is taken by one of them, `lanes` elements at a
time, in an order that depends on its width alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from linker_core.engine.cpu.emitter import (
    F32,
    I64,
    POINTER,
    Emitter,
    i64,
    vector,
)
from linker_core.engine.cpu.folding import sums
from linker_core.engine.cpu.widening import element_of, load_widened

# 64-bit words of the record that a region is called with.
TASK = (
    "x",
    "x_stride",  # elements between rows
    "out",  # may be x
    "out_stride",
    "rows",  # which rows of x and out, int64
    "num_rows",
    "num_parts",  # vectors in a row, one behind the other
    "width",  # elements of a vector
    "weight",  # where it lies
    "weight_by_row",  # 1 if `weight` is where the address of each of the task's rows' own lies
    "eps",  # a float32's bits
)
_TASK = {name: number for number, name in enumerate(TASK)}


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """One kind of norm.

    Attributes:
        dtype: Of the weight's words, as checkpoints name it.
        plus_one: Whether the factor is 1 + w (Gemma) and not w.
        lanes: float32 elements of a vector.
    """

    dtype: str
    plus_one: bool
    lanes: int

    @property
    def symbol(self) -> str:
        """The name of its region."""
        return f"norm_{self.dtype}{'_plus_one' if self.plus_one else ''}"


def emit_norm(module: ir.Module, spec: NormSpec) -> None:
    """Adds `spec.symbol`, to be called on every thread of a region with a task's address."""
    one_vector = _emit_vector(module, spec)
    e = Emitter(module, spec.symbol, [POINTER])
    b, (task,) = e.builder, e.arguments
    x, out, rows, weight = (
        e.field(task, _TASK[key], POINTER) for key in ("x", "out", "rows", "weight")
    )
    by_row = b.icmp_signed("!=", e.field(task, _TASK["weight_by_row"]), i64(0))
    x_stride, out_stride, num_parts, width = (
        e.field(task, _TASK[key]) for key in ("x_stride", "out_stride", "num_parts", "width")
    )
    eps = e.field(task, _TASK["eps"], F32)
    num_vectors = b.mul(e.field(task, _TASK["num_rows"]), num_parts)
    thread, num_threads = e.thread_number(), e.num_threads()
    first = b.sdiv(b.mul(num_vectors, thread), num_threads)
    stop = b.sdiv(b.mul(num_vectors, b.add(thread, i64(1))), num_threads)
    with e.loop(first, stop) as number:
        place = b.sdiv(number, num_parts)
        row, own = e.field(rows, place), e.own_address(weight, by_row, place)
        start = b.mul(b.srem(number, num_parts), width)
        source = e.at(x, b.add(b.mul(row, x_stride), start), F32)
        target = e.at(out, b.add(b.mul(row, out_stride), start), F32)
        e.call(one_vector, source, target, own, width, eps)
    e.finish()


def _emit_vector(module: ir.Module, spec: NormSpec) -> ir.Function:
    """(x, out, weight, width, eps): one vector."""
    kinds = [POINTER, POINTER, POINTER, I64, F32]
    e = Emitter(module, f"{spec.symbol}_vector", kinds, exported=False)
    b, (x, out, weight, width, eps) = e.builder, e.arguments
    whole = e.round_down(width, spec.lanes)
    mean = b.fdiv(_sum_of_squares(e, spec, x, whole, width), b.sitofp(width, F32))
    root = e.intrinsic("sqrt", b.fadd(mean, eps))
    scale = b.fdiv(ir.Constant(F32, 1.0), root)

    def normalise(k: ir.Value, lanes: int) -> None:
        words = load_widened(e, e.at(weight, k, element_of(spec.dtype)), spec.dtype, lanes)
        factor = b.fadd(words, e.constant(1.0, words)) if spec.plus_one else words
        scaled = b.fmul(e.load(e.at(x, k, F32), vector(F32, lanes)), e.splat(scale, lanes))
        e.store(b.fmul(scaled, factor), e.at(out, k, F32))

    with e.loop(0, whole, spec.lanes) as k:
        normalise(k, spec.lanes)
    with e.loop(whole, width) as k:
        normalise(k, 1)
    return e.finish()


def _sum_of_squares(
    e: Emitter, spec: NormSpec, x: ir.Value, whole: ir.Value, width: ir.Value
) -> ir.Value:
    """Lane j sums elements j, j + lanes, …; then come the lanes' halves, then what is left."""
    squares = e.variable(e.zeros(spec.lanes))
    with e.loop(0, whole, spec.lanes) as k:
        part = e.load(e.at(x, k, F32), vector(F32, spec.lanes))
        squares.set(e.fma(part, part, squares.get()))
    total = e.variable(sums(e, [squares.get()])[0])
    with e.loop(whole, width) as k:
        element = e.load(e.at(x, k, F32), F32)
        total.set(e.fma(element, element, total.get()))
    return total.get()
