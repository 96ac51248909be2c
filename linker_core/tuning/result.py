"""What a tuner found: the frontier of priced plans and the one it chose. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from linker_core.sharing.price import Price
from linker_core.sharing.rungs import AnyRung, Residual, parse_rung


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedPlan:
    """One point of the frontier."""

    origin: str  # why it was tried: "identical bytes alone", "all blocks", …
    rungs: Mapping[str, AnyRung]  # every stored tensor
    rung_bytes: Mapping[str, int]  # unique bytes by kind of rung
    price: Price

    @property
    def unique_bytes(self) -> int:
        return sum(self.rung_bytes.values())

    @property
    def has_residuals(self) -> bool:
        return any(isinstance(rung, Residual) for rung in self.rungs.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the point as plain JSON values; `from_json` restores it."""
        return {
            "origin": self.origin,
            "unique_bytes": self.unique_bytes,
            "rung_bytes": dict(self.rung_bytes),
            **self.price.to_json(),
            "rungs": {name: str(rung) for name, rung in self.rungs.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a point from `to_json`."""
        return cls(
            origin=record["origin"],
            rungs={name: parse_rung(rung) for name, rung in record["rungs"].items()},
            rung_bytes=dict(record["rung_bytes"]),
            price=Price.from_json(record),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """Every plan that was priced, all on the same tokens, by unique bytes; and the choice."""

    chosen: PricedPlan
    frontier: tuple[PricedPlan, ...]
    reference_tokens: int
    calibration: str  # digest of the text
    forward_passes: float  # what all pricing together computed, in passes of the whole variant
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain JSON values; `from_json` restores it."""
        return {
            "chosen": self.chosen.to_json(),
            "reference_tokens": self.reference_tokens,
            "calibration": self.calibration,
            "forward_passes": self.forward_passes,
            "seconds": self.seconds,
            "frontier": [plan.to_json() for plan in self.frontier],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a result from `to_json`."""
        return cls(
            chosen=PricedPlan.from_json(record["chosen"]),
            frontier=tuple(PricedPlan.from_json(plan) for plan in record["frontier"]),
            reference_tokens=record["reference_tokens"],
            calibration=record["calibration"],
            forward_passes=record["forward_passes"],
            seconds=record["seconds"],
        )
