"""What a scan found: sums of every tensor, cos and ε of every block, and the pair's region.

A sampled scan read some rows only: its numbers are estimates, and each carries its bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any, NamedTuple, Self

from linker_core.sharing.similarity import PairSums


class Region(StrEnum):
    """How far a variant sits from its donor (DESIGN's reading of BS table 2)."""

    ALIGNED = "aligned"
    BOUNDARY = "boundary"
    OUTSIDE = "outside"


class Interval(NamedTuple):
    """Where a number lies, at the level of confidence of its sample."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Where cos and ε lie when only a sample was read."""

    cos: Interval
    epsilon: Interval

    def to_json(self) -> dict[str, list[float]]:
        """Returns both intervals as pairs."""
        return {"cos": list(self.cos), "epsilon": list(self.epsilon)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds bounds from `to_json`."""
        return cls(cos=Interval(*record["cos"]), epsilon=Interval(*record["epsilon"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How a sampled scan sampled. Finiteness was checked only in what was read."""

    fraction: float  # of the rows of a matrix, asked for
    level: float  # of confidence of each interval
    whole_blocks: tuple[int, ...]  # read to the last row, as their sample could not decide
    bounds: Bounds  # of the means over all blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScan:
    """One decoder layer: BS Eq. 1 and Eq. 2 over all its K sub-parameters."""

    index: int
    params: Mapping[str, PairSums]  # sub-parameter -> sums
    bounds: Bounds | None = None  # None: read whole, cos and ε are exact

    @property
    def cos(self) -> float:
        """sim(i) of BS Eq. 1: the mean over K, norms and biases included."""
        return fmean(sums.cos for sums in self.params.values())

    @property
    def epsilon(self) -> float:
        """ε(i) of BS Eq. 2: the mean over K, norms and biases included."""
        return fmean(sums.epsilon for sums in self.params.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanReport:
    """What a scan found. Holds sums, so that other aggregations need no second reading."""

    donor: str  # as the caller named it
    variant: str
    bytes_read: int
    scan_seconds: float
    blocks: tuple[BlockScan, ...]
    outside_blocks: Mapping[str, PairSums]  # embedding, final norm, head where shapes agree
    identical_rows: Mapping[str, int]
    """Of embedding and head: the variant's rows whose bytes are those of the donor's same row.

    There for each of the two that both checkpoints hold in the same width and type, whatever their
    vocabularies; empty after a sampled scan.
    """
    sample: Sample | None = None  # None: everything was read

    @property
    def mean_cos(self) -> float:
        return fmean(block.cos for block in self.blocks)

    @property
    def mean_epsilon(self) -> float:
        return fmean(block.epsilon for block in self.blocks)

    @property
    def region(self) -> Region:
        return region(self.mean_cos, self.mean_epsilon)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON values; `from_json` restores it."""
        return {
            "donor": self.donor,
            "variant": self.variant,
            "bytes_read": self.bytes_read,
            "scan_seconds": self.scan_seconds,
            "mean_cos": self.mean_cos,
            "mean_epsilon": self.mean_epsilon,
            "region": self.region.value,
            "blocks": [
                {
                    "index": block.index,
                    "cos": block.cos,
                    "epsilon": block.epsilon,
                    "params": {name: _sums_record(sums) for name, sums in block.params.items()},
                    "bounds": None if block.bounds is None else block.bounds.to_json(),
                }
                for block in self.blocks
            ],
            "outside_blocks": {
                name: _sums_record(sums) for name, sums in self.outside_blocks.items()
            },
            "identical_rows": dict(self.identical_rows),
            "sample": None if self.sample is None else _sample_record(self.sample),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a report from `to_json`."""
        return cls(
            donor=record["donor"],
            variant=record["variant"],
            bytes_read=record["bytes_read"],
            scan_seconds=record["scan_seconds"],
            blocks=tuple(
                BlockScan(
                    index=block["index"],
                    params={name: _sums(entry) for name, entry in block["params"].items()},
                    bounds=block["bounds"] and Bounds.from_json(block["bounds"]),
                )
                for block in record["blocks"]
            ),
            outside_blocks={name: _sums(entry) for name, entry in record["outside_blocks"].items()},
            identical_rows=record["identical_rows"],
            sample=record["sample"] and _sample(record["sample"]),
        )


def region(mean_cos: float, mean_epsilon: float) -> Region:
    """Returns the region of a pair from its means over all blocks."""
    if mean_cos < 0.97 or mean_epsilon > 0.25:
        return Region.OUTSIDE
    if mean_epsilon > 0.10 or mean_cos < 0.99:
        return Region.BOUNDARY
    return Region.ALIGNED


def _sums_record(sums: PairSums) -> dict[str, Any]:
    return {"cos": sums.cos, "epsilon": sums.epsilon, **asdict(sums)}


def _sums(record: Mapping[str, Any]) -> PairSums:
    return PairSums(**{key: record[key] for key in PairSums.__dataclass_fields__})


def _sample_record(sample: Sample) -> dict[str, Any]:
    return {
        "fraction": sample.fraction,
        "level": sample.level,
        "whole_blocks": list(sample.whole_blocks),
        "bounds": sample.bounds.to_json(),
        "note": "finiteness was checked only in what was read; no tensor counts as identical",
    }


def _sample(record: Mapping[str, Any]) -> Sample:
    return Sample(
        fraction=record["fraction"],
        level=record["level"],
        whole_blocks=tuple(record["whole_blocks"]),
        bounds=Bounds.from_json(record["bounds"]),
    )
