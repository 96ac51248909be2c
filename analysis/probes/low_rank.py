"""What low-rank factors of a delta take at a given Frobenius error (BS K, table 11).

Legend: O output width, I input width, S the smaller of both, L the larger.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.probes.blocks import read_finite
from analysis.probes.result import ProbeResult, Value
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key

TOLERANCE = 0.05
_CHUNK_ROWS = 1024  # of the delta, turned into float64 at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the error allowed."""
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"largest |Δ - Δ_r| / |Δ|, Frobenius (default {TOLERANCE})",
    )


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Finds the ranks of all deltas."""
    return measure(family, tolerance=args.tolerance)


def measure(family: StudiedFamily, *, tolerance: float = TOLERANCE) -> ProbeResult:
    """Compares the elements of low-rank factors with those of the blocks' matrices.

    Raises:
        InvalidRequestError: A tolerance outside 0 to 1.
        BadCheckpointError: NaN or infinite weights, or a file that changed.
    """
    if not 0.0 < tolerance < 1.0:
        raise InvalidRequestError(
            f"The tolerance is {tolerance}, expected between 0 and 1.", param="tolerance"
        )
    rows: list[tuple[Value, ...]] = []
    for label, variant in family.variants.items():
        blocks = [
            list(_ranks(family.base, variant, layer, tolerance))
            for layer in range(family.base.config.num_layers)
        ]
        rows.append((label, *_summary(blocks)))
    return ProbeResult(
        title=f"Low-rank factors of the deltas at a Frobenius error of {tolerance:g}",
        columns=(
            "variant", "blocks", "ratio_mean", "ratio_min", "ratio_max", "blocks_below_1", "rank",
        ),
        rows=tuple(rows),
        facts={"tolerance": tolerance},
        notes=(
            "ratio is Σ r(O + I) / Σ O·I over a block's matrices, r the least rank within the "
            "tolerance: above 1 the factors take more than the matrices themselves. rank is the "
            "mean of r as a part of the smaller width.",
            "BS table 11 at 0.05: mean 1.18-1.22, one block of 88 below 1. A Frobenius error says "
            "little about what a model computes; `linker tune` measures that.",
        ),
    )  # fmt: skip


class _Rank(NamedTuple):
    """Of one matrix: O and I, and the rank its delta needs."""

    rows: int
    columns: int
    rank: int


def _summary(blocks: Sequence[Sequence[_Rank]]) -> tuple[Value, ...]:
    """Returns all columns but the variant's."""
    ratios = [
        sum(found.rank * (found.rows + found.columns) for found in block)
        / sum(found.rows * found.columns for found in block)
        for block in blocks
    ]
    shares = [found.rank / min(found.rows, found.columns) for block in blocks for found in block]
    below = sum(ratio < 1 for ratio in ratios)
    return len(blocks), fmean(ratios), min(ratios), max(ratios), below, fmean(shares)


def _ranks(base: Checkpoint, variant: Checkpoint, layer: int, tolerance: float) -> Iterator[_Rank]:
    for name, tensor in variant.tensors.items():
        key = parse_key(name)
        assert key is not None
        if key.layer != layer or len(tensor.shape) != 2:
            continue
        delta_OI = read_finite(variant, name) - read_finite(base, name)
        yield _Rank(*tensor.shape, least_rank(delta_OI, tolerance))


def least_rank(delta_OI: NDArray[np.float32], tolerance: float) -> int:
    """Returns the least r with |Δ - Δ_r| ≤ tolerance · |Δ|, Δ_r the best matrix of rank r.

    |Δ - Δ_r|² is the sum of the squared singular values after the r-th (Eckart and Young); they
    are the eigenvalues of the smaller of ΔᵀΔ and ΔΔᵀ, which is summed in float64.
    """
    delta_LS = delta_OI if delta_OI.shape[0] >= delta_OI.shape[1] else delta_OI.T
    gram_SS = np.zeros((delta_LS.shape[1],) * 2)
    for start in range(0, len(delta_LS), _CHUNK_ROWS):
        rows = delta_LS[start : start + _CHUNK_ROWS].astype(np.float64)
        gram_SS += rows.T @ rows
    squares_S = np.linalg.eigvalsh(gram_SS).clip(min=0.0)  # ascending
    dropped_S = np.cumsum(squares_S)
    num_dropped = np.searchsorted(dropped_S, tolerance**2 * dropped_S[-1], side="right")
    return len(squares_S) - int(num_dropped)
