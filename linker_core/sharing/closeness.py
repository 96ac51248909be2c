"""How near a model is to a candidate for its donor, from a few rows of every matrix.

Enough to tell a fine-tune from a stranger and the nearest of several donors; what is shared is
decided by a whole scan afterwards.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from linker_core.pace import Pace
from linker_core.sharing.family import check_same_family
from linker_core.sharing.pieces import Piece, whole_pieces
from linker_core.sharing.report import Region, region
from linker_core.sharing.scan import (
    block_params,
    is_outside_blocks,
    numbers_by_name,
    refuse_nonfinite,
    whole_sums,
)
from linker_core.sharing.sweep import Progress, sweep
from linker_core.weights.checkpoint import Checkpoint

ROWS = 32  # read of a matrix that has more, one of each stratum of neighbours
_SEED = 0  # the same pair always gets the same answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """Estimates of the means over all blocks of BS Eq. 1 and Eq. 2."""

    mean_cos: float
    mean_epsilon: float

    @property
    def region(self) -> Region:
        return region(self.mean_cos, self.mean_epsilon)


def measure_closeness(
    donor: Checkpoint,
    variant: Checkpoint,
    *,
    progress: Progress | None = None,
    pace: Pace | None = None,
    mapped: bool = False,
) -> Closeness:
    """Compares a sample of rows of every block; reads nothing outside the blocks.

    cos and ε are ratios of sums over the rows that were read, which scaling the sums up would not
    change. Vectors and small matrices are read whole.

    Args:
        donor: The candidate.
        variant: The model that looks for a donor.
        progress: See `scan`.
        pace: Holds back while sequences run.
        mapped: See `sweep`: only for a process that a damaged file may end.

    Raises:
        BadCheckpointError: Different families, NaN or infinite weights in what was read, or a file
            that changed.
    """
    check_same_family(donor.config, variant.config)
    rng = random.Random(_SEED)
    names = [name for name in variant.tensors if not is_outside_blocks(name)]
    pieces = [piece for name in names for piece in _sample(donor, variant, name, rng)]
    found = sweep(pieces, donor, variant, mapped=mapped, pace=pace or Pace(), progress=progress)
    refuse_nonfinite(pieces, found, donor, variant)
    sums = {
        name: whole_sums(pieces, found, numbers)
        for name, numbers in numbers_by_name(pieces).items()
    }
    blocks = [list(params.values()) for params in block_params(variant.config, sums)]
    return Closeness(
        mean_cos=fmean(fmean(pair.cos for pair in block) for block in blocks),
        mean_epsilon=fmean(fmean(pair.epsilon for pair in block) for block in blocks),
    )


def _sample(
    donor: Checkpoint, variant: Checkpoint, name: str, rng: random.Random
) -> Iterator[Piece]:
    shape = variant.tensors[name].shape
    if len(shape) != 2 or shape[0] <= 2 * ROWS:
        yield from whole_pieces(donor, variant, name)
        return
    num_rows, width = shape
    edges = [index * num_rows // ROWS for index in range(ROWS + 1)]
    for begin, end in itertools.pairwise(edges):
        yield Piece(name, rng.randrange(begin, end) * width, width, True, 0)
