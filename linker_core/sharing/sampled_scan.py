"""A scan of some rows, and of everything the sample cannot decide about.

For a first look at large models. Finiteness is checked only in what is read, a change in a few rows
can hide from any sample of rows, and no tensor of which only rows were read counts as identical:
the server and policy `exact` never use such a report.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping

from linker_core.errors import InvalidRequestError
from linker_core.pace import Pace
from linker_core.sharing.family import check_same_family
from linker_core.sharing.pieces import Findings, Piece, comparable, whole_pieces
from linker_core.sharing.report import BlockScan, Bounds, Sample, ScanReport, region
from linker_core.sharing.sampling import (
    Estimate,
    RowSums,
    Stratum,
    draw_strata,
    estimate,
    mean_bounds,
)
from linker_core.sharing.scan import (
    is_outside_blocks,
    numbers_by_name,
    refuse_nonfinite,
    whole_sums,
)
from linker_core.sharing.sweep import Progress, piece_bytes, sweep
from linker_core.sharing.thresholds import BOUNDARY_EPSILON, Thresholds
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key

LEVEL = 0.99  # of confidence, of each interval

Choose = Callable[[ScanReport], Thresholds]


def sampled_scan(
    donor: Checkpoint,
    variant: Checkpoint,
    *,
    fraction: float,
    rng: random.Random,
    choose: Choose,
    level: float = LEVEL,
    progress: Progress | None = None,
) -> ScanReport:
    """Scans a sample of rows, then whole what the sample leaves open.

    Vectors and small matrices are read whole; of each other matrix at least 128 rows. Blocks whose
    bounds hold a threshold are read whole, and everything if the bounds of the means hold a limit
    of the regions or the boundary rule's ε.

    Args:
        donor: The model whose storage would be aliased.
        variant: The model that would alias it.
        fraction: Of the rows of each matrix, within (0, 1].
        rng: Draws the rows; the same state draws the same rows.
        choose: Returns the thresholds for a report, see `choose_thresholds`.
        level: Of confidence, of each interval.
        progress: Called with bytes read and bytes to read, anew for what is read whole.

    Raises:
        BadCheckpointError: As `scan`, of what is read.
        InvalidRequestError: A fraction out of range, or what `choose` refuses.
    """
    if not 0.0 < fraction <= 1.0:
        raise InvalidRequestError(
            f"sample is {fraction}, expected above 0, up to 1.", param="sample"
        )
    check_same_family(donor.config, variant.config)
    scanner = _SampledScan(donor, variant, fraction=fraction, level=level, progress=progress)
    names = [name for name in variant.tensors if comparable(donor, variant, name)]
    scanner.sample(names, rng)
    scanner.read_whole(name for name in names if scanner.estimates[name].decides_nothing)
    report = scanner.report()
    if not _means_decide(report):
        scanner.read_whole(names)
        return scanner.report()
    thresholds = choose(report)
    open_blocks = [block for block in report.blocks if thresholds.decide(block) is None]
    scanner.read_whole(
        name for name in names for block in open_blocks if _layer(name) == block.index
    )
    report = scanner.report()
    if not _means_decide(report):
        scanner.read_whole(names)
        report = scanner.report()
    return report


class _SampledScan:
    """What is known of each tensor so far."""

    def __init__(
        self,
        donor: Checkpoint,
        variant: Checkpoint,
        *,
        fraction: float,
        level: float,
        progress: Progress | None,
    ) -> None:
        self._donor, self._variant = donor, variant
        self._fraction, self._level = fraction, level
        self._progress = progress
        self._started = time.monotonic()
        self._bytes_read = 0
        self.estimates: dict[str, Estimate] = {}
        self._sampled: set[str] = set()

    def sample(self, names: Iterable[str], rng: random.Random) -> None:
        """Reads some rows of large matrices, and small tensors whole."""
        drawn: dict[str, list[Stratum]] = {}
        whole: list[str] = []
        for name in names:
            shape = self._variant.tensors[name].shape
            strata = draw_strata(shape[0], self._fraction, rng) if len(shape) == 2 else None
            if strata is None:
                whole.append(name)
            else:
                drawn[name] = strata
        self.read_whole(whole)
        pieces = [
            Piece(name, row * columns, columns, True, 0)
            for name, strata in drawn.items()
            for columns in (self._variant.tensors[name].shape[1],)
            for stratum in strata
            for row in stratum.rows
        ]
        found = self._sweep(pieces)
        for name, numbers in numbers_by_name(pieces).items():
            rows = [RowSums(*found.piece_sums(number)) for number in numbers]
            count = math.prod(self._variant.tensors[name].shape)
            self.estimates[name] = estimate(drawn[name], rows, count=count)
        self._sampled = set(drawn)

    def read_whole(self, names: Iterable[str]) -> None:
        """Reads what of these tensors has only been sampled so far."""
        pending = {name for name in names if name in self._sampled or name not in self.estimates}
        pieces = [
            piece
            for name in self._variant.tensors
            if name in pending
            for piece in whole_pieces(self._donor, self._variant, name)
        ]
        found = self._sweep(pieces)
        for name, numbers in numbers_by_name(pieces).items():
            self.estimates[name] = Estimate(sums=whole_sums(pieces, found, numbers))
        self._sampled -= pending

    def report(self) -> ScanReport:
        """Returns what is known; blocks of which all was read have no bounds."""
        assert not any(part.decides_nothing for part in self.estimates.values())
        layers = [
            {
                key.parameter: self.estimates[name]
                for name in self.estimates
                if (key := parse_key(name)) is not None and key.layer == index
            }
            for index in range(self._variant.config.num_layers)
        ]
        blocks = tuple(self._block(index, params) for index, params in enumerate(layers))
        whole = tuple(block.index for block in blocks if block.bounds is None)
        means = mean_bounds([list(params.values()) for params in layers], level=self._level)
        return ScanReport(
            donor=str(self._donor.path),
            variant=str(self._variant.path),
            bytes_read=self._bytes_read,
            scan_seconds=time.monotonic() - self._started,
            blocks=blocks,
            outside_blocks={
                name: self.estimates[name].sums
                for name in self._variant.tensors
                if name in self.estimates and is_outside_blocks(name)
            },
            identical_rows={},
            sample=Sample(
                fraction=self._fraction, level=self._level, whole_blocks=whole, bounds=means
            ),
        )

    def _block(self, index: int, params: Mapping[str, Estimate]) -> BlockScan:
        bounds: Bounds | None = None
        if any(part.epsilon_variances for part in params.values()):
            bounds = mean_bounds([list(params.values())], level=self._level)
        return BlockScan(
            index=index,
            params={name: part.sums for name, part in params.items()},
            bounds=bounds,
        )

    def _sweep(self, pieces: list[Piece]) -> Findings:
        found = sweep(
            pieces,
            self._donor,
            self._variant,
            mapped=False,
            pace=Pace(),
            progress=self._progress,
        )
        refuse_nonfinite(pieces, found, self._donor, self._variant)
        self._bytes_read += sum(piece_bytes(p, self._donor, self._variant) for p in pieces)
        return found


def _means_decide(report: ScanReport) -> bool:
    """Returns whether the means lie within one region, and on one side of the boundary rule."""
    assert report.sample is not None
    cos, epsilon = report.sample.bounds.cos, report.sample.bounds.epsilon
    if epsilon.low <= BOUNDARY_EPSILON < epsilon.high:
        return False
    return region(cos.low, epsilon.high) is region(cos.high, epsilon.low)


def _layer(name: str) -> int | None:
    key = parse_key(name)
    assert key is not None
    return key.layer
