"""What a scan reads: runs of elements, small enough that all cores end at the same time."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME

PIECE_ELEMENTS = 1 << 20
SUMS_PER_PIECE = 4  # <a, b>, |a|², |b|², |a - b|²


class Piece(NamedTuple):
    """A run of a tensor, compared with the donor's same run, or only looked at."""

    name: str
    start: int  # elements, row-major
    length: int
    compared: bool  # else the variant's alone is checked for NaN and infinities
    row: int  # elements of a row where equal rows are counted; 0: they are not


class Findings:
    """What the pieces of one sweep held, by the piece's number."""

    def __init__(self, num_pieces: int) -> None:
        self.sums = array("d", bytes(8 * SUMS_PER_PIECE * num_pieces))
        self.identical = bytearray(num_pieces)
        self.equal_rows = array("q", bytes(8 * num_pieces))
        self.donor_nonfinite = array("q", bytes(8 * num_pieces))
        self.variant_nonfinite = array("q", bytes(8 * num_pieces))

    def piece_sums(self, number: int) -> Sequence[float]:
        """Returns the four sums of one piece."""
        return self.sums[SUMS_PER_PIECE * number : SUMS_PER_PIECE * (number + 1)]


def comparable(donor: Checkpoint, variant: Checkpoint, name: str) -> bool:
    """Returns whether both have this tensor in the same shape."""
    return name in donor.tensors and donor.tensors[name].shape == variant.tensors[name].shape


def counts_rows(donor: Checkpoint, variant: Checkpoint, name: str) -> bool:
    """Returns whether this is an embedding or head whose rows can be the donor's."""
    if name not in (EMBED_NAME, LM_HEAD_NAME) or name not in donor.tensors:
        return False
    a, b = donor.tensors[name], variant.tensors[name]
    return (a.dtype, a.shape[1:]) == (b.dtype, b.shape[1:])


def whole_pieces(donor: Checkpoint, variant: Checkpoint, name: str) -> Iterator[Piece]:
    """Yields the pieces that cover one tensor of the variant."""
    shape = variant.tensors[name].shape
    count = math.prod(shape)
    if counts_rows(donor, variant, name):
        row = shape[1]
        common = min(donor.tensors[name].shape[0], shape[0]) * row
        step = max(1, PIECE_ELEMENTS // row) * row
        yield from _run(name, 0, common, step=step, compared=True, row=row)
        yield from _run(name, common, count, step=step, compared=False, row=0)
        return
    compared = comparable(donor, variant, name)
    yield from _run(name, 0, count, step=PIECE_ELEMENTS, compared=compared, row=0)


def single_pieces(checkpoint: Checkpoint) -> Iterator[Piece]:
    """Yields the pieces that cover one checkpoint by itself."""
    for name, tensor in checkpoint.tensors.items():
        yield from _run(
            name, 0, math.prod(tensor.shape), step=PIECE_ELEMENTS, compared=False, row=0
        )


def _run(
    name: str, begin: int, end: int, *, step: int, compared: bool, row: int
) -> Iterator[Piece]:
    for start in range(begin, end, step):
        yield Piece(name, start, min(step, end - start), compared, row)
