"""Emits the folding of vectors into one number each, by halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from linker_core.engine.cpu.emitter import I32, Emitter, vector


def sums(e: Emitter, vectors: Sequence[ir.Value]) -> list[ir.Value]:
    """Returns the sum of each vector's lanes: halves are added until one lane is left.

    The order within a vector does not depend on how many there are.
    """
    totals = folded(e, vectors, e.builder.fadd)
    return [e.lane(totals, number) for number in range(len(vectors))]


def folded(
    e: Emitter,
    vectors: Sequence[ir.Value],
    combine: Callable[[ir.Value, ir.Value], ir.Value],
) -> ir.Value:
    """Returns one lane for each vector, in which all of that vector's lanes are combined.

    Halves are combined until one lane is left; while there are several vectors, the halves of
    two of them share one.

    Args:
        e: Where it goes.
        vectors: All of one type, whose lanes are a power of two.
        combine: Of two vectors, lane by lane.

    Returns:
        A vector with a power of two of lanes; those behind the last vector's mean nothing.
    """
    b, parts = e.builder, list(vectors)
    parts += [parts[-1]] * ((1 << (len(parts) - 1).bit_length()) - len(parts))
    lanes = width = parts[0].type.count  # each part holds lanes / width vectors' lanes
    while width > 1:
        width //= 2
        other = lanes if len(parts) > 1 else None  # where the second of two parts begins
        starts = [
            start
            for first in ((0,) if other is None else (0, other))
            for start in range(first, first + lanes, 2 * width)
        ]
        low, high = (
            _lane_numbers([start + half + i for start in starts for i in range(width)])
            for half in (0, width)
        )
        seconds = parts if other is None else parts[1::2]
        firsts = parts if other is None else parts[::2]
        parts = [
            combine(b.shuffle_vector(x, y, low), b.shuffle_vector(x, y, high))
            for x, y in zip(firsts, seconds, strict=True)
        ]
        lanes = parts[0].type.count
    while len(parts) > 1:
        lanes *= 2
        every = _lane_numbers(range(lanes))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [b.shuffle_vector(x, y, every) for x, y in pairs]
    return parts[0]


def _lane_numbers(lanes: Sequence[int] | range) -> ir.Constant:
    numbers = list(lanes)
    return ir.Constant(vector(I32, len(numbers)), numbers)
