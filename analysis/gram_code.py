"""Emits the loop of the Gram pass: inner products of deltas over raw words of several models.

Words are widened exactly to float64, the base's are taken off, and every sum is kept in registers,
a lane each for as many elements as a vector holds. Knows neither files nor threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from linker_core.engine.cpu.emitter import (
    F32,
    I8,
    I32,
    I64,
    POINTER,
    Emitter,
    Variable,
    i64,
    vector,
)
from linker_core.engine.cpu.widening import element_of, load_part_widened, load_widened

FUNCTION = "gram_tile"
F64 = ir.DoubleType()
_AHEAD_BYTES = 2048  # of a stream: so many streams at once are more than a CPU foresees


class TileCode(NamedTuple):
    """What one loop computes. Its values: 0 is W_B, i > 0 is the delta of the i-th fine-tune."""

    dtypes: tuple[str, ...]  # as safetensors names them, the base's first
    products: tuple[tuple[int, int], ...]  # pairs of values, multiplied and summed
    lanes: int  # elements of a vector


def emit_tile(module: ir.Module, code: TileCode) -> None:
    """Adds `gram_tile(addresses, count, run, sums)` to a module.

    Args:
        module: Where it goes.
        code: What it computes. The function takes the address of a list of addresses of words, one
            a model; how many elements there are; how many of them are a run; and where float64 sums
            are, [runs, products], to which it adds.
    """
    e = Emitter(module, FUNCTION, (POINTER, I64, I64, POINTER))
    addresses, count, run, sums = e.arguments
    words = [e.field(addresses, number, POINTER) for number in range(len(code.dtypes))]
    row = e.variable(sums)
    with e.loop(0, count, run) as start:
        stop = e.minimum(e.builder.add(start, run), count)
        totals = _Totals(e, code, words)
        totals.add_run(start, stop)
        totals.store(row.get())
        row.set(e.at(row.get(), len(code.products), F64))
    e.finish()


class _Totals:
    """The sums of one run while it is read."""

    def __init__(self, e: Emitter, code: TileCode, words: Sequence[ir.Value]) -> None:
        self._e, self._code = e, code
        self._streams = tuple(zip(words, code.dtypes, strict=True))
        zeros = ir.Constant(vector(F64, code.lanes), [0.0] * code.lanes)
        self._sums: list[Variable] = [e.variable(zeros) for _ in code.products]

    def add_run(self, start: ir.Value, stop: ir.Value) -> None:
        """Adds the products of all elements from `start` to below `stop`, at least one."""
        e, lanes = self._e, self._code.lanes
        # The first by itself: what follows reads one element before the first that it adds.
        self._add_part(start, i64(1))
        second = e.builder.add(start, i64(1))
        rest = e.builder.add(second, e.round_down(e.builder.sub(stop, second), 2 * lanes))
        with e.loop(second, rest, 2 * lanes) as k:
            for base, dtype in self._streams:
                element = e.at(base, k, element_of(dtype))
                e.prefetch(e.at(element, _AHEAD_BYTES, I8))
            for half in (0, 1):
                self._add_half(k, half)
        with e.loop(rest, stop, lanes) as k:
            self._add_part(k, e.minimum(e.builder.sub(stop, k), lanes))

    def store(self, row: ir.Value) -> None:
        """Adds the sums, across their lanes, to those in memory."""
        e = self._e
        for number, total in enumerate(self._sums):
            place = e.at(row, number, F64)
            e.store(e.builder.fadd(e.load(place, F64), _across(e, total.get())), place)

    def _add_half(self, index: ir.Value, half: int) -> None:
        """Adds one of the two vectors of elements that begin at an index.

        BF16's are the elements of even and of odd numbers, which are the same for every model.
        """
        e, lanes = self._e, self._code.lanes
        if "BF16" in self._code.dtypes:
            first = e.builder.add(index, i64(half))
            narrow = [_every_second(e, base, dtype, first, lanes) for base, dtype in self._streams]
        else:
            first = e.builder.add(index, i64(half * lanes))
            narrow = [
                load_widened(e, e.at(base, first, element_of(dtype)), dtype, lanes)
                for base, dtype in self._streams
            ]
        self._add(narrow)

    def _add_part(self, index: ir.Value, count: ir.Value) -> None:
        """Adds `count` elements, no more than a vector; no others are read."""
        e, lanes = self._e, self._code.lanes
        self._add([
            load_part_widened(e, e.at(base, index, element_of(dtype)), dtype, count, lanes)
            for base, dtype in self._streams
        ])  # fmt: skip

    def _add(self, narrow: Sequence[ir.Value]) -> None:
        """Adds the products of one vector of elements of every model, given as float32."""
        e, lanes = self._e, self._code.lanes
        values: list[ir.Value] = []
        for weights in narrow:
            wide = e.builder.fpext(weights, vector(F64, lanes))
            values.append(e.builder.fsub(wide, values[0]) if values else wide)
        for (i, j), total in zip(self._code.products, self._sums, strict=True):
            fused = e.call_named(f"llvm.fma.v{lanes}f64", values[i], values[j], total.get())
            total.set(fused)


def _every_second(e: Emitter, base: ir.Value, dtype: str, index: ir.Value, lanes: int) -> ir.Value:
    """Reads the elements index, index + 2, … as float32; the one before them is there, too."""
    b = e.builder
    before = e.at(base, b.sub(index, i64(1)), element_of(dtype))
    if dtype == "BF16":
        # The upper half of each 32-bit word that ends with the element: neither shuffle nor shift.
        pairs = b.load(before, typ=vector(I32, lanes))
        pairs.align = 2
        upper = b.and_(pairs, ir.Constant(pairs.type, [0xFFFF0000] * lanes))
        return b.bitcast(upper, vector(F32, lanes))
    both = load_widened(e, before, dtype, 2 * lanes)
    odd = ir.Constant(vector(I32, lanes), list(range(1, 2 * lanes, 2)))
    return b.shuffle_vector(both, both, odd)


def _across(e: Emitter, total: ir.Value) -> ir.Value:
    """Adds a vector's lanes, neighbours first."""
    lanes = [e.lane(total, number) for number in range(total.type.count)]
    while len(lanes) > 1:
        lanes = [e.builder.fadd(a, b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes[0]
