"""How a tensor of a variant is stored, from the cheapest form to the dearest, with exact bytes.

Knows shapes alone. A residual is written as its parts: `rank8:8` (factors of rank 8 in 8 bits),
`int4:64` (a code of 4 bits for each weight, a scale for each 64 of a row), `signs:64`, or one of
each, `rank4:8+signs:64`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from linker_core.errors import InvalidRequestError

CODE_BITS = (1, 2, 3, 4)  # of a weight's code
GROUPS = (32, 64, 128, 256)  # weights of a row that share a scale
FACTOR_BITS = (4, 8, 16)  # of an element of a low-rank factor; 16: bfloat16, without scales
MAX_RANK = 4_096
FACTOR_GROUP = 64  # of factors in 4 bits; in 8 bits a factor's row has one scale
CODE_UNIT = 128  # codes are stored in runs of so many weights
BYTE_UNIT = 16  # and 8-bit elements in runs of so many
SCALE_BYTES = 2  # bfloat16
# Of how deltas are rounded to rungs; another one for every change of the bytes that come of it, so
# that no price and no folder of bytes made otherwise is taken for one of these.
ENCODING: Final = 1
_NAMES = {1: "signs", 2: "int2", 3: "int3", 4: "int4"}
_BITS = {name: bits for bits, name in _NAMES.items()}
_FACTORS = re.compile(r"rank(\d{1,4}):(\d{1,2})", re.ASCII)
_CODES = re.compile(r"(signs|int2|int3|int4):(\d{1,3})", re.ASCII)


class Rung(StrEnum):
    """A tensor, or its rows, that is the donor's or the variant's own.

    ROWS is an embedding or a head of which only the rows that differ from the donor's are stored.
    """

    ALIAS = "alias"
    ROWS = "rows"
    OWN = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """The donor's tensor plus the delta, compressed: codes, low-rank factors, or their sum."""

    bits: int = 0  # of a weight's code, 1 to 4; 0: no codes
    group: int = 0  # weights that share a scale; 0 without codes
    rank: int = 0  # 0: no factors
    factor_bits: int = 0  # 0 without factors

    def __post_init__(self) -> None:
        assert bool(self.bits) == bool(self.group), self
        assert bool(self.rank) == bool(self.factor_bits), self
        assert self.bits or self.rank, "a residual keeps something"

    def __str__(self) -> str:
        factors = [f"rank{self.rank}:{self.factor_bits}"] if self.rank else []
        codes = [f"{_NAMES[self.bits]}:{self.group}"] if self.bits else []
        return "+".join((*factors, *codes))

    @property
    def kind(self) -> str:
        """What the rung is called where its numbers do not matter."""
        factors = ["lowrank"] if self.rank else []
        codes = [_NAMES[self.bits]] if self.bits else []
        return "+".join((*factors, *codes))


AnyRung = Rung | Residual


def parse_rung(text: str) -> AnyRung:
    """Reads a rung as `str` writes it.

    Raises:
        InvalidRequestError: No such rung.
    """
    if text in set(Rung):
        return Rung(text)
    *first, last = text.split("+", 1)
    factors = _FACTORS.fullmatch(first[0] if first else last)
    codes = _CODES.fullmatch(last)
    rank, factor_bits = (int(number) for number in factors.groups()) if factors else (0, 0)
    bits, group = (_BITS[codes[1]], int(codes[2])) if codes else (0, 0)
    sound = (
        (factors is not None or (codes is not None and not first))
        and (codes is not None or not first)
        and (factors is None or (0 < rank <= MAX_RANK and factor_bits in FACTOR_BITS))
        and (codes is None or group in GROUPS)
    )
    if not sound:
        raise InvalidRequestError(
            f"{text!r:.60} is no rung. Expected alias, rows, own, or a residual such as "
            "'rank8:8', 'int4:64' or 'rank4:8+signs:64'.",
            param="rungs",
        )
    return Residual(bits=bits, group=group, rank=rank, factor_bits=factor_bits)


def kind_of(rung: AnyRung) -> str:
    """Returns what reports count a rung as: alias, lowrank, signs, int4, lowrank+signs, own …."""
    return rung.value if isinstance(rung, Rung) else rung.kind


COARSE = ("alias", "residual", "own")  # what blocks are counted as, the cheapest first


def coarse(rung: AnyRung) -> str:
    """Returns which of `COARSE` a matrix's rung is."""
    return "residual" if isinstance(rung, Residual) else rung.value


def coded_bytes(rows: int, width: int, *, bits: int, group: int) -> int:
    """Returns what a matrix takes in codes, its scales included.

    Args:
        rows: Of the matrix.
        width: Of a row.
        bits: Of an element; 16 is bfloat16.
        group: Elements of a row that share a scale; not looked at for 16 bits.
    """
    if bits == 16:
        return rows * width * 2
    return rows * (code_row_bytes(width, bits) + num_groups(width, group) * SCALE_BYTES)


def code_row_bytes(width: int, bits: int) -> int:
    """Returns the bytes of a row's codes, without its scales."""
    if bits == 16:
        return width * 2
    if bits == 8:
        return -(-width // BYTE_UNIT) * BYTE_UNIT
    return -(-width // CODE_UNIT) * CODE_UNIT * bits // 8


def num_groups(width: int, group: int) -> int:
    """Returns how many scales a row has."""
    return -(-width // group)


def factor_group(width: int, factor_bits: int) -> int:
    """Returns how many elements of a factor's row share a scale."""
    return FACTOR_GROUP if factor_bits == 4 else width


def residual_bytes(rung: Residual, rows: int, width: int) -> int:
    """Returns what the delta of a matrix takes on a rung.

    Args:
        rung: Which.
        rows: O, of the weight.
        width: I, of the weight.
    """
    total = 0
    if rung.bits:
        total += coded_bytes(rows, width, bits=rung.bits, group=rung.group)
    for length in (rows, width) if rung.rank else ():
        group = factor_group(length, rung.factor_bits)
        total += coded_bytes(rung.rank, length, bits=rung.factor_bits, group=group)
    return total
