"""How a run of coded weights is multiplied with rows of x, with and without bfloat16 units.

A run is of 128 weights, and a run of x takes as many bytes whichever way it is packed. `FloatSteps`
computes in float32. `PairSteps` looks 32 levels up at once, which are bfloat16 numbers, and
multiplies them with x as the sum of two such: what that leaves of x out is below 2⁻¹⁶ of it. Sums
are float32 in both.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from llvmlite import ir

from linker_core.engine.cpu.decoding import LANES, Decoder
from linker_core.engine.cpu.dot_product import BFLOAT
from linker_core.engine.cpu.emitter import F32, I8, I16, I32, Emitter, vector
from linker_core.residency.coding import LEVELS
from linker_core.sharing.rungs import CODE_UNIT

RUN_BYTES: Final = CODE_UNIT * 4  # of packed x
_PAIR = 2 * LANES  # weights that are multiplied together


class CodedSteps(Protocol):
    """Multiplies stretches of runs, lane by lane."""

    def pack(self, e: Emitter, x: ir.Value, target: ir.Value) -> None:
        """Writes a run of x, 128 float32, to where `parts` is to read it."""

    def parts(
        self, e: Emitter, xs: Sequence[ir.Value], runs: Sequence[ir.Value], stretch: range
    ) -> list[list[ir.Value]]:
        """Returns sums of levels times x, by row of x and of the matrix.

        Args:
            e: Where it goes.
            xs: Addresses of packed runs, of every row of x.
            runs: Addresses of runs of codes, of every row of the matrix.
            stretch: The weights of the run that are multiplied: those of one scale.
        """


class FloatSteps:
    """In float32, sixteen at a time."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def pack(self, e: Emitter, x: ir.Value, target: ir.Value) -> None:
        for first in range(0, CODE_UNIT, LANES):
            values = e.load(e.at(x, first, F32), vector(F32, LANES))
            e.store(values, e.at(target, first, F32))

    def parts(
        self, e: Emitter, xs: Sequence[ir.Value], runs: Sequence[ir.Value], stretch: range
    ) -> list[list[ir.Value]]:
        parts: list[list[ir.Value]] = []
        for first in range(stretch.start, stretch.stop, LANES):
            levels = [self._decoder.load(e, run, first) for run in runs]
            values = [e.load(e.at(x, first, F32), vector(F32, LANES)) for x in xs]
            if not parts:
                parts = [[e.builder.fmul(level, value) for level in levels] for value in values]
                continue
            parts = [
                [e.fma(level, value, part) for level, part in zip(levels, of_row, strict=True)]
                for value, of_row in zip(values, parts, strict=True)
            ]
        return parts


class _Places(NamedTuple):
    """Two sixteens of a run, as multiples of 16 weights."""

    first: int
    second: int


class PairSteps:
    """In bfloat16 pairs, on CPUs that multiply them into float32 sums (AVX512_BF16).

    Args:
        bits: Of a code, 4 at most.
        group: Weights that share a scale.
        rounded: Whether x is rounded to bfloat16, and its rest left out.
    """

    def __init__(self, bits: int, group: int, *, rounded: bool) -> None:
        assert bits in LEVELS
        self._bits, self._rounded = bits, rounded
        self._order = list(_order(bits, min(group, CODE_UNIT)))

    def pack(self, e: Emitter, x: ir.Value, target: ir.Value) -> None:
        b, kind = e.builder, vector(F32, _PAIR)
        for number, places in enumerate(self._order):
            halves = [e.load(e.at(x, place * LANES, F32), vector(F32, LANES)) for place in places]
            values = b.shuffle_vector(*halves, _lanes(range(_PAIR)))
            high = b.bitcast(b.fptrunc(values, vector(BFLOAT, _PAIR)), vector(I16, _PAIR))
            e.store(high, e.at(target, number * _PAIR, I16))
            wide = b.shl(b.zext(high, vector(I32, _PAIR)), _all(I32, 16))
            rest = b.fsub(values, b.bitcast(wide, kind))
            low = b.bitcast(b.fptrunc(rest, vector(BFLOAT, _PAIR)), vector(I16, _PAIR))
            e.store(low, e.at(target, CODE_UNIT + number * _PAIR, I16))

    def parts(
        self, e: Emitter, xs: Sequence[ir.Value], runs: Sequence[ir.Value], stretch: range
    ) -> list[list[ir.Value]]:
        parts = [[e.zeros(LANES) for _ in runs] for _ in xs]
        for number, places in enumerate(self._order):
            if places.first * LANES not in stretch:
                continue
            levels = [self._levels(e, run, places) for run in runs]
            for offset in (0,) if self._rounded else (0, CODE_UNIT):
                for x, of_row in zip(xs, parts, strict=True):
                    words = e.load(e.at(x, offset + number * _PAIR, I16), vector(I16, _PAIR))
                    value = e.builder.bitcast(words, vector(BFLOAT, _PAIR))
                    for out, level in enumerate(levels):
                        of_row[out] = e.call_named(
                            "llvm.x86.avx512bf16.dpbf16ps.512", of_row[out], level, value
                        )
        return parts

    def _levels(self, e: Emitter, run: ir.Value, places: _Places) -> ir.Value:
        """Returns the levels of 32 weights."""
        b = e.builder
        if self._bits == 3:
            low = b.and_(_codes(e, run, places, 2), _all(I16, 3))
            high = _codes(e, e.at(run, CODE_UNIT * 2 // 8, I8), places, 1)
            indices = b.or_(low, b.shl(b.and_(high, _all(I16, 1)), _all(I16, 2)))
        else:
            indices = _codes(e, run, places, self._bits)
        levels = LEVELS[self._bits] * (_PAIR // len(LEVELS[self._bits]))
        table = ir.Constant(vector(I16, _PAIR), [_bfloat_bits(level) for level in levels])
        found = e.call_named("llvm.x86.avx512.permvar.hi.512", table, indices)
        return b.bitcast(found, vector(BFLOAT, _PAIR))


def _order(bits: int, length: int) -> Iterator[_Places]:
    """Yields a run's sixteens by twos: both of one scale, and where they can of one shift.

    Args:
        bits: Of a code.
        length: Weights of a run that share a scale.
    """
    per_chunk = 8 // (2 if bits == 3 else bits)  # sixteens whose low bits lie in the same bytes
    apart = per_chunk if 2 * per_chunk * LANES <= length else 1
    for start in range(0, CODE_UNIT // LANES, 2 * apart):
        for first in range(start, start + apart):
            yield _Places(first, first + apart)


def _codes(e: Emitter, run: ir.Value, places: _Places, bits: int) -> ir.Value:
    """Returns 32 codes of bits that divide a byte, with other codes above them."""
    b, per_chunk = e.builder, 8 // bits
    chunks, shifts = zip(*(divmod(place, per_chunk) for place in places), strict=True)
    address = e.at(run, chunks[0] * LANES, I8)
    if chunks[0] == chunks[1]:
        once = e.load(address, vector(I8, LANES))
        words = b.shuffle_vector(once, once, _lanes([*range(LANES), *range(LANES)]))
    else:
        assert chunks[1] == chunks[0] + 1
        words = e.load(address, vector(I8, _PAIR))
    amounts = [shift * bits for shift in shifts for _ in range(LANES)]
    wide = b.zext(words, vector(I16, _PAIR))
    return b.lshr(wide, ir.Constant(wide.type, amounts))


def _bfloat_bits(value: float) -> int:
    """Returns the word of a number that bfloat16 has."""
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    assert bits % (1 << 16) == 0
    return bits >> 16


def _lanes(numbers: Sequence[int]) -> ir.Constant:
    return ir.Constant(vector(I32, len(numbers)), list(numbers))


def _all(element: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(vector(element, _PAIR), [value] * _PAIR)
