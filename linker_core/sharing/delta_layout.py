"""Which entries of a delta file hold a tensor, with their types and shapes. Knows no file.

Legend: O rows that donor and variant both have, I width, r rank.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple

from linker_core.sharing.rungs import (
    AnyRung,
    Residual,
    Rung,
    code_row_bytes,
    factor_group,
    num_groups,
)
from linker_core.weights.safetensors_header import FLOATS

DELTA_FILE = "delta.safetensors"
CODES_TYPE, SCALES_TYPE, POSITIONS_TYPE = "U8", "BF16", "I64"
ITEM_BYTES: Final = MappingProxyType({**FLOATS, CODES_TYPE: 1, POSITIONS_TYPE: 8})


class CodedPart(NamedTuple):
    """One coded matrix of a residual."""

    name: str  # dense [O, I], down [r, I] or up [r, O]
    rows: int
    width: int
    bits: int
    group: int


class Entry(NamedTuple):
    """One entry of a delta file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def coded_parts(rung: Residual, rows: int, width: int) -> list[CodedPart]:
    """Returns the coded matrices of a residual, in the order in which they are stored.

    Args:
        rung: Which.
        rows: O.
        width: I.
    """
    parts = []
    if rung.bits:
        parts.append(CodedPart("dense", rows, width, rung.bits, rung.group))
    if rung.rank:
        for name, length in (("down", width), ("up", rows)):
            group = factor_group(length, rung.factor_bits)
            parts.append(CodedPart(name, rung.rank, length, rung.factor_bits, group))
    return parts


def deciding_entry(name: str, rung: AnyRung) -> str | None:
    """Returns the entry whose type is the variant's own; None for an alias, which has none."""
    if rung is Rung.ALIAS:
        return None
    if rung is Rung.OWN:
        return name
    return f"{name}.rows" if rung is Rung.ROWS else f"{name}.extra"


def entries_of(
    name: str, rung: AnyRung, shape: tuple[int, ...], dtype: str, *, num_rows: int
) -> list[Entry]:
    """Returns everything that is stored of one tensor.

    Args:
        name: Of the tensor.
        rung: How it is stored.
        shape: Of the whole.
        dtype: The variant's.
        num_rows: Rows stored as they are: own ones on rung ROWS, those that the donor lacks beside
            a residual.
    """
    if rung is Rung.ALIAS:
        return []
    if rung is Rung.OWN:
        return [Entry(name, dtype, shape)]
    rows, width = shape
    if rung is Rung.ROWS:
        positions = Entry(f"{name}.positions", POSITIONS_TYPE, (num_rows,))
        return [Entry(f"{name}.rows", dtype, (num_rows, width)), positions]
    assert isinstance(rung, Residual)
    entries = []
    for part in coded_parts(rung, rows - num_rows, width):
        stem = f"{name}.{part.name}"
        codes = (part.rows, code_row_bytes(part.width, part.bits))
        entries.append(Entry(f"{stem}.codes", CODES_TYPE, codes))
        if part.bits < 16:
            scales = (part.rows, num_groups(part.width, part.group))
            entries.append(Entry(f"{stem}.scales", SCALES_TYPE, scales))
    return [*entries, Entry(f"{name}.extra", dtype, (num_rows, width))]
