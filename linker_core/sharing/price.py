"""What a plan costs the variant, as measured: how far its answers are from the unshared ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from linker_core.config import MatmulPrecision


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Means over the response tokens of a calibration text; all of one plan on the same tokens.

    A budget is held against `kl_upper`, the upper end of a bootstrap interval: of all the text, or
    of the kind of text where it is highest.
    """

    kl: float  # KL(variant ‖ planned) of the next-token distributions, nats
    kl_upper: float  # nats
    top1: float  # share of positions where both prefer the same token
    ppl_ratio: float  # perplexity of the text under the plan over that under the variant
    tokens: int  # response tokens measured
    calibration: str  # digest of the text
    matmul_precision: MatmulPrecision | None  # of both sides; None: nothing was measured
    encoding: int | None  # `rungs.ENCODING` of the plan's residuals; None: nothing was measured

    def to_json(self) -> dict[str, Any]:
        """Returns the price as plain JSON values; `from_json` restores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a price from `to_json`."""
        return cls(**{field: record[field] for field in cls.__dataclass_fields__})
