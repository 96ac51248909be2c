"""What a scan found: sums of every tensor, cos and ε of every block, and the pair's region."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any, Self

from linker_core.sharing.similarity import PairSums


class Region(StrEnum):
    """How far a variant sits from its donor (DESIGN's reading of BS table 2)."""

    ALIGNED = "aligned"
    BOUNDARY = "boundary"
    OUTSIDE = "outside"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScan:
    """One decoder layer: BS Eq. 1 and Eq. 2 over all its K sub-parameters."""

    index: int
    params: Mapping[str, PairSums]  # sub-parameter -> sums

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
                }
                for block in self.blocks
            ],
            "outside_blocks": {
                name: _sums_record(sums) for name, sums in self.outside_blocks.items()
            },
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
                )
                for block in record["blocks"]
            ),
            outside_blocks={name: _sums(entry) for name, entry in record["outside_blocks"].items()},
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
