"""Emits the reading of coded weights as float32, sixteen at a time and in their order.

See `linker_core.residency.coding` for how codes lie. Sixteen neighbours of 1 to 4 bits share a
place in the bytes of a chunk, so that one shift brings them down and one lookup makes them levels.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from llvmlite import ir

from linker_core.engine.cpu.emitter import F32, I8, I16, I32, I64, Emitter, Index, vector
from linker_core.engine.cpu.widening import load_widened
from linker_core.residency.coding import LEVELS
from linker_core.sharing.rungs import CODE_UNIT

LANES: Final = 16  # weights that are decoded together; LLVM splits them where vectors are shorter
_FLOATS, _NUMBERS = vector(F32, LANES), vector(I32, LANES)
_TABLE = 16  # entries; fewer levels are repeated, so that higher bits of an index do not matter


class Lookup(StrEnum):
    """How a CPU finds sixteen entries of a table at once."""

    AVX512 = "avx512"
    AVX2 = "avx2"  # eight in a table of eight
    MEMORY = "memory"  # one by one


class Decoder:
    """Reads codes of some bits.

    Args:
        bits: 1, 2, 3, 4, 8 or 16.
        lookup: How levels are found.
    """

    def __init__(self, bits: int, lookup: Lookup) -> None:
        self.bits = bits
        self.unit = CODE_UNIT if bits < 8 else LANES  # weights whose codes lie together
        self._lookup = lookup

    def row_bytes(self, e: Emitter, width: ir.Value) -> ir.Value:
        """Returns the bytes of a row's codes."""
        whole = width if self.bits == 16 else e.round_up(width, self.unit)
        return e.builder.udiv(e.builder.mul(whole, e.index(self.bits)), e.index(8))

    def load(self, e: Emitter, codes: ir.Value, first: Index) -> ir.Value:
        """Returns the weights `first` to `first + 15` of a row, without their scale.

        Args:
            e: Where it goes.
            codes: Address of the row's.
            first: A multiple of 16.
        """
        b = e.builder
        if self.bits == 16:
            return self._widened(e, e.load(e.at(codes, first, I16), vector(I16, LANES)))
        if self.bits == 8:
            words = e.load(e.at(codes, first, I8), vector(I8, LANES))
            return b.sitofp(b.sext(words, _NUMBERS), _FLOATS)
        place = b.sdiv(e.index(first), e.index(LANES))
        return self._levels(e, self._indices(e, codes, place))

    def load_part(self, e: Emitter, codes: ir.Value, first: Index, count: ir.Value) -> ir.Value:
        """Returns the `count` weights that are left of a row, fewer than 16, and anything finite.

        Only 16-bit rows end without padding, so nothing else is read with care.
        """
        if self.bits < 16:
            return self.load(e, codes, first)
        return self._widened(e, e.load_part(e.at(codes, first, I16), I16, count, LANES))

    def _indices(self, e: Emitter, codes: ir.Value, place: ir.Value) -> ir.Value:
        """Returns the codes of the 16 weights at a place, the number of such before them."""
        b = e.builder
        if self.bits != 3:
            return self._chunk(e, codes, place, self.bits)
        runs, within = (
            operation(place, e.index(CODE_UNIT // LANES)) for operation in (b.udiv, b.urem)
        )
        run = e.at(codes, b.mul(runs, e.index(CODE_UNIT * 3 // 8)), I8)
        low = b.and_(self._chunk(e, run, within, 2), _all(3))
        high = self._chunk(e, e.at(run, CODE_UNIT * 2 // 8, I8), within, 1)
        return b.or_(low, b.shl(b.and_(high, _all(1)), _all(2)))

    def _chunk(self, e: Emitter, codes: ir.Value, place: ir.Value, bits: int) -> ir.Value:
        """Returns codes of bits that divide a byte, with other codes above them."""
        b, per_byte = e.builder, e.index(8 // bits)
        address = e.at(codes, b.mul(b.udiv(place, per_byte), e.index(LANES)), I8)
        words = b.zext(e.load(address, vector(I8, LANES)), _NUMBERS)
        shift = b.mul(b.urem(place, per_byte), e.index(bits))
        return b.lshr(words, e.splat(b.trunc(shift, I32), LANES))

    def _levels(self, e: Emitter, indices: ir.Value) -> ir.Value:
        levels = LEVELS[self.bits] * (_TABLE // len(LEVELS[self.bits]))
        if self._lookup is Lookup.AVX512:
            table = ir.Constant(_FLOATS, list(levels))
            return e.call_named("llvm.x86.avx512.permvar.sf.512", table, indices)
        if self._lookup is Lookup.AVX2:
            return _levels_in_halves(e, levels, indices, is_whole=self.bits == 4)
        return _levels_one_by_one(e, levels, indices)

    @staticmethod
    def _widened(e: Emitter, words: ir.Value) -> ir.Value:
        b = e.builder
        return b.bitcast(b.shl(b.zext(words, _NUMBERS), _all(16)), _FLOATS)


def load_scale(e: Emitter, scales: ir.Value, number: Index) -> ir.Value:
    """Returns a scale as float32."""
    return e.lane(load_widened(e, e.at(scales, number, I16), "BF16", 1), 0)


def _levels_in_halves(
    e: Emitter, levels: tuple[float, ...], indices: ir.Value, *, is_whole: bool
) -> ir.Value:
    """Looks up with tables of eight; `is_whole`: there are 16 levels, not eight repeated."""
    b, half = e.builder, LANES // 2
    kind = vector(F32, half)
    tables = [ir.Constant(kind, list(levels[first : first + half])) for first in (0, half)]
    parts = []
    for first in (0, half):
        lanes = ir.Constant(vector(I32, half), list(range(first, first + half)))
        part = b.shuffle_vector(indices, indices, lanes)
        low, high = (e.call_named("llvm.x86.avx2.permps", table, part) for table in tables)
        if is_whole:
            bit = b.and_(part, ir.Constant(part.type, [half] * half))
            is_low = b.icmp_unsigned("==", bit, ir.Constant(part.type, [0] * half))
            low = b.select(is_low, low, high)
        parts.append(low)
    return b.shuffle_vector(*parts, ir.Constant(_NUMBERS, list(range(LANES))))


def _levels_one_by_one(e: Emitter, levels: tuple[float, ...], indices: ir.Value) -> ir.Value:
    """Looks up in memory."""
    b = e.builder
    name = f"levels_{len(set(levels))}"
    table = e.module.globals.get(name)
    if table is None:
        kind = ir.ArrayType(F32, _TABLE)
        table = ir.GlobalVariable(e.module, kind, name)
        table.linkage, table.global_constant = "internal", True
        table.initializer = ir.Constant(kind, list(levels))
    within = b.and_(indices, _all(_TABLE - 1))
    found = e.zeros(LANES)
    for lane in range(LANES):
        index = b.zext(e.lane(within, lane), I64)
        level = e.load(b.gep(table, [index], source_etype=F32), F32)
        found = b.insert_element(found, level, ir.Constant(I32, lane))
    return found


def _all(value: int) -> ir.Constant:
    return ir.Constant(_NUMBERS, [value] * LANES)
