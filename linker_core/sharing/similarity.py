"""One pass over two tensors: the sums from which cosine, ε, finiteness and equality follow.

Legend: a is the donor's tensor, b the variant's, both as flat words. Sums are float64 throughout,
since a float32 sum over 10**7 terms is wrong by as much as the effect that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from linker_core.weights.checkpoint import Checkpoint

_TILE = 1 << 16  # words a step: two float64 tiles stay in the second-level cache

Words = npt.NDArray[np.uint16] | npt.NDArray[np.float16] | npt.NDArray[np.float32]
Reals = npt.NDArray[np.float64]
_WORD_TYPES: Final = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSums:
    """The sums of one pair of tensors. Any aggregation over K needs nothing else."""

    dot: float  # <a, b>
    donor_square: float  # |a|²
    variant_square: float  # |b|²
    delta_square: float  # |a - b|², summed directly, never expanded
    identical: bool  # same type and same bytes
    count: int  # elements of each
    num_nonfinite: int  # of the variant's elements

    @property
    def cos(self) -> float:
        """BS Eq. 1's summand. Both zero: 1; only one zero: 0 (BS leaves these undefined)."""
        if self.identical:
            return 1.0  # the square roots below would round it
        norms = math.sqrt(self.donor_square) * math.sqrt(self.variant_square)
        if norms == 0.0:
            return 1.0 if self.donor_square == self.variant_square else 0.0
        return max(-1.0, min(1.0, self.dot / norms))

    @property
    def epsilon(self) -> float:
        """BS Eq. 2's summand. Both zero: 0; only one zero: 1 (BS leaves these undefined)."""
        if self.donor_square == 0.0:
            return 0.0 if self.variant_square == 0.0 else 1.0
        return math.sqrt(self.delta_square) / math.sqrt(self.donor_square)


class TileReader:
    """Reads a checkpoint's tensors tile by tile into one reused pair of buffers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._bytes = np.empty(_TILE * 4, dtype=np.uint8)
        # The upper half of each float32 is where a bfloat16's bits go.
        self._widened = np.zeros(_TILE, dtype=np.float32)
        self._upper_halves = self._widened.view(np.uint16)[1::2]
        self._reals = np.empty(_TILE, dtype=np.float64)

    def read(self, name: str, start: int, count: int) -> tuple[Words, Reals]:
        """Returns elements as stored and as float64; both are valid until the next read.

        Args:
            name: The tensor.
            start: First element, in row-major order.
            count: How many, at most a tile.

        Raises:
            BadCheckpointError: The file changed.
        """
        dtype = self._checkpoint.tensors[name].dtype
        word_type = _WORD_TYPES[dtype]
        item_bytes = np.dtype(word_type).itemsize
        raw = self._bytes[: count * item_bytes]
        self._checkpoint.read_into(name, raw.data, offset_bytes=start * item_bytes)
        words: Words = raw.view(word_type)
        reals = self._reals[:count]
        if dtype == "BF16":
            self._upper_halves[:count] = words
            reals[:] = self._widened[:count]
        else:
            reals[:] = words
        return words, reals


@np.errstate(invalid="ignore", over="ignore")  # NaN and infinities are counted, not warned of
def compare(
    name: str,
    donor: TileReader,
    variant: TileReader,
    *,
    count: int,
    progress: Callable[[int], None],
) -> PairSums:
    """Returns the sums of one tensor that both checkpoints have in the same shape.

    Args:
        name: The tensor.
        donor: Reader of the donor.
        variant: Reader of the variant.
        count: Elements of the tensor.
        progress: Called with the number of elements compared since the last call.

    Raises:
        BadCheckpointError: A file changed.
    """
    dot = donor_square = variant_square = delta_square = 0.0
    identical, num_nonfinite = True, 0
    for start in range(0, count, _TILE):
        length = min(_TILE, count - start)
        words_a, a = donor.read(name, start, length)
        words_b, b = variant.read(name, start, length)
        dot += _dot(a, b)
        donor_square += _dot(a, a)
        variant_square += (tile_square := _dot(b, b))
        if not math.isfinite(tile_square):
            num_nonfinite += length - int(np.count_nonzero(np.isfinite(b)))
        np.subtract(a, b, out=a)
        delta_square += (tile_delta := _dot(a, a))
        # Bytes are compared only where the values agree: -0.0 equals 0.0 but is another word.
        identical = identical and tile_delta == 0.0 and _same_words(words_a, words_b)
        progress(length)
    return PairSums(
        dot=dot,
        donor_square=donor_square,
        variant_square=variant_square,
        delta_square=delta_square,
        identical=identical,
        count=count,
        num_nonfinite=num_nonfinite,
    )


@np.errstate(invalid="ignore", over="ignore")
def count_nonfinite(name: str, reader: TileReader, *, count: int) -> int:
    """Returns how many elements of one tensor are NaN or infinite."""
    total = 0
    for start in range(0, count, _TILE):
        length = min(_TILE, count - start)
        _, values = reader.read(name, start, length)
        if not math.isfinite(_dot(values, values)):
            total += length - int(np.count_nonzero(np.isfinite(values)))
    return total


def _dot(x: Reals, y: Reals) -> float:
    # einsum stays on the calling thread; BLAS would start a pool of its own for each of ours.
    return float(np.einsum("i,i", x, y))


def _same_words(a: Words, b: Words) -> bool:
    return a.dtype == b.dtype and bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))
