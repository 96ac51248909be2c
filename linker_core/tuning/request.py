"""What a tuner is asked: which pair, towards what, on which text. Plain values, no tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from linker_core.config import MatmulPrecision
from linker_core.errors import InvalidRequestError
from linker_core.sharing.rungs import ENCODING
from linker_core.tuning.offered import OFFERED

SELF_CALIBRATION = "self"
Device = Literal["cpu", "cuda"]
DEFAULT_BUDGET_KL = 0.01  # nats per response token
MAX_POINTS = 64
FIT_POINTS = 8  # plans of each variant that a joint choice has to choose from


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneGoal:
    """Exactly one of: a budget to spend, a size to fit, given rungs, or a spread of plans."""

    budget_kl: float | None = None  # nats; fewest bytes whose price stays within
    max_bytes: int | None = None  # unique bytes; lowest price within
    rungs: Mapping[str, str] | None = None  # tensor -> rung; priced as they are
    num_points: int | None = None  # so many plans from few bytes to many; none of them is chosen

    def check(self) -> None:
        """Refuses what cannot be aimed at.

        Raises:
            InvalidRequestError: Not exactly one aim, or a number out of range.
        """
        stated = [value for value in asdict(self).values() if value is not None]
        if len(stated) != 1:
            raise InvalidRequestError(
                "Give either budget_kl or max_bytes.", param="budget_kl" if stated else "max_bytes"
            )
        if self.budget_kl is not None and not 0.0 <= self.budget_kl < float("inf"):
            raise InvalidRequestError(
                f"budget_kl is {self.budget_kl}, expected nats per token, 0 or more.",
                param="budget_kl",
            )
        if self.max_bytes is not None and self.max_bytes < 0:
            raise InvalidRequestError(
                f"max_bytes is {self.max_bytes}, expected 0 or more.", param="max_bytes"
            )
        if self.num_points is not None and not 1 <= self.num_points <= MAX_POINTS:
            raise InvalidRequestError(
                f"num_points is {self.num_points}, expected 1 to {MAX_POINTS}.", param="num_points"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """One run of the tuner."""

    donor: str  # directory
    variant: str  # directory
    report: Mapping[str, Any]  # ScanReport.to_json of the two
    donor_fingerprint: str
    goal: TuneGoal
    calibration: str | None = None  # None: shipped dialogues; "self"; or a file of JSON lines
    device: Device = "cpu"
    matmul_precision: MatmulPrecision = "highest"  # that the variant is served with

    def to_json(self) -> dict[str, Any]:
        """Returns the request as plain JSON values; `from_json` restores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a request from `to_json`."""
        return cls(**{**record, "goal": TuneGoal(**record["goal"])})


def tuning_key(goal: TuneGoal, calibration_digest: str, precision: MatmulPrecision) -> str:
    """Returns what a stored result is found by, besides the two fingerprints.

    How deltas are rounded and which rungs there are to choose from are part of it.

    Args:
        goal: What was aimed at.
        calibration_digest: Of all that decides the text that the variant reads.
        precision: Of the products; a price holds at its own alone.
    """
    known = [asdict(goal), calibration_digest, precision, ENCODING, [str(rung) for rung in OFFERED]]
    record = json.dumps(known, sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()
