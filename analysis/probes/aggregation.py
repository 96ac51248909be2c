"""A block's number out of its K tensors: by mean, worst, best, or all of them as one (BS G and P).

Eq. 1 and 2 are means over K. A mean can hide one tensor that moved far; whether it does follows
from a scan's sums without another reading.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from analysis.family import StudiedFamily
from analysis.probes.result import ProbeResult, Value
from linker_core.errors import InvalidRequestError
from linker_core.sharing.report import BlockScan, ScanReport
from linker_core.sharing.scan import scan
from linker_core.sharing.thresholds import CONSERVATIVE, Thresholds

COLUMNS = (
    "variant", "group", "blocks", "of", "min", "mean", "max", "gap", "worst", "concatenated",
)  # fmt: skip


class Measured(NamedTuple):
    """One aggregation of a block."""

    cos: float
    epsilon: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the thresholds that divide blocks into shared and rejected."""
    cos, frob = CONSERVATIVE.tau_cos, CONSERVATIVE.tau_frob
    parser.add_argument(
        "--tau-cos",
        type=float,
        default=cos,
        metavar="COS",
        help=f"least cosine of a block that is shared, BS Eq. 3 (default {cos})",
    )
    parser.add_argument(
        "--tau-frob",
        type=float,
        default=frob,
        metavar="EPSILON",
        help=f"largest epsilon of a block that is shared, BS Eq. 3 (default {frob})",
    )


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Scans every variant and aggregates in all ways."""
    thresholds = Thresholds(tau_cos=args.tau_cos, tau_frob=args.tau_frob, source="explicit")
    return measure(family, thresholds)


def measure(family: StudiedFamily, thresholds: Thresholds = CONSERVATIVE) -> ProbeResult:
    """Aggregates the blocks of every variant in all ways.

    Raises:
        InvalidRequestError: A threshold out of range.
        BadCheckpointError: NaN or infinite weights, or a file that changed.
    """
    if not (-1.0 <= thresholds.tau_cos <= 1.0 and 0.0 <= thresholds.tau_frob < math.inf):
        raise InvalidRequestError(
            f"Thresholds are {thresholds.tau_cos} and {thresholds.tau_frob}, expected a cosine "
            "from -1 to 1 and an ε of 0 or more."
        )
    reports = {label: scan(family.base, variant) for label, variant in family.variants.items()}
    rows = [row for label, report in reports.items() for row in _rows(label, report, thresholds)]
    facts: dict[str, Value] = {}
    for label, report in reports.items():
        for name, aggregate in AGGREGATIONS.items():
            facts[f"{label}: blocks shared by {name}"] = sum(
                _passes(aggregate(block), thresholds) for block in report.blocks
            )
        facts[f"{label}: farthest tensor"] = _farthest(report)
    return ProbeResult(
        title="Aggregations over a block's tensors",
        columns=COLUMNS,
        rows=tuple(rows),
        facts=facts,
        notes=(
            "min, mean and max are means over the blocks of the least, mean and greatest number "
            "within a block; gap is from the mean to the worse end, worst the worst tensor of "
            "all blocks (BS tables 9 and 16); concatenated takes a block as one vector (table 6).",
            f"Shared: cos ≥ {thresholds.tau_cos} and ε ≤ {thresholds.tau_frob} by the mean (BS "
            "Eq. 3). Best takes a block's greatest cosine and least ε, worst the opposite.",
        ),
    )


def of_mean(block: BlockScan) -> Measured:
    """BS Eq. 1 and 2."""
    return Measured(block.cos, block.epsilon)


def of_worst(block: BlockScan) -> Measured:
    """The least cosine and the largest ε, of whichever tensors."""
    pairs = block.params.values()
    return Measured(min(pair.cos for pair in pairs), max(pair.epsilon for pair in pairs))


def of_best(block: BlockScan) -> Measured:
    """The greatest cosine and the least ε."""
    pairs = block.params.values()
    return Measured(max(pair.cos for pair in pairs), min(pair.epsilon for pair in pairs))


def of_concatenation(block: BlockScan) -> Measured:
    """All the block's tensors as one vector: large ones count for what they are.

    A block of zeros counts as its tensors do: equal to zeros, orthogonal to anything else.
    """
    pairs = block.params.values()
    a_square = math.fsum(pair.donor_square for pair in pairs)
    b_square = math.fsum(pair.variant_square for pair in pairs)
    if a_square == 0.0 or b_square == 0.0:
        same = a_square == b_square
        return Measured(float(same), float(not same))
    dot = math.fsum(pair.dot for pair in pairs)
    delta_square = math.fsum(pair.delta_square for pair in pairs)
    norms = math.sqrt(a_square) * math.sqrt(b_square)
    return Measured(min(1.0, dot / norms), math.sqrt(delta_square / a_square))


AGGREGATIONS: dict[str, Callable[[BlockScan], Measured]] = {
    "mean": of_mean,
    "worst": of_worst,
    "best": of_best,
    "concatenation": of_concatenation,
}


def _passes(found: Measured, thresholds: Thresholds) -> bool:
    return found.cos >= thresholds.tau_cos and found.epsilon <= thresholds.tau_frob


def _rows(label: str, report: ScanReport, thresholds: Thresholds) -> list[tuple[Value, ...]]:
    """Returns a row for all blocks, and one each for those shared and rejected, if there are."""
    shared = [block for block in report.blocks if thresholds.shares(block)]
    rejected = [block for block in report.blocks if not thresholds.shares(block)]
    groups = {"all": report.blocks, "shared": shared, "rejected": rejected}
    return [
        row for group, blocks in groups.items() if blocks for row in _pair(label, group, blocks)
    ]


def _pair(label: str, group: str, blocks: Sequence[BlockScan]) -> Iterator[tuple[Value, ...]]:
    """Yields a group's row of cosines and its row of ε."""
    place = (label, group, len(blocks))
    whole = [of_concatenation(block) for block in blocks]
    cosines = [[pair.cos for pair in block.params.values()] for block in blocks]
    least, mean = fmean(map(min, cosines)), fmean(map(fmean, cosines))
    yield (
        *place, "cos", least, mean, fmean(map(max, cosines)), mean - least,
        min(map(min, cosines)), fmean(found.cos for found in whole),
    )  # fmt: skip
    epsilons = [[pair.epsilon for pair in block.params.values()] for block in blocks]
    mean, most = fmean(map(fmean, epsilons)), fmean(map(max, epsilons))
    yield (
        *place, "epsilon", fmean(map(min, epsilons)), mean, most, most - mean,
        max(map(max, epsilons)), fmean(found.epsilon for found in whole),
    )  # fmt: skip


def _farthest(report: ScanReport) -> str:
    epsilon, layer, name = max(
        (pair.epsilon, block.index, name)
        for block in report.blocks
        for name, pair in block.params.items()
    )
    return f"block {layer}, {name}: ε {epsilon:.4f}"
