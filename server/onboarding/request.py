"""What an operator asks for: a name, a source and how to share. Names are checked here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from linker_core.errors import InvalidRequestError
from linker_core.sharing.thresholds import load_tiers

AUTO_DONOR = "auto"
RESERVED = frozenset({"jobs", "events", "plan", "load", "unload"})
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"{_PART}(/{_PART})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnboardRequest:
    """One model to onboard. Two requests are identical iff they are equal once resolved."""

    name: str
    source: str
    donor: str | None = AUTO_DONOR  # a model, "auto", or None: a family of its own
    policy: str = "thresholds"
    tau_cos: float | None = None
    tau_frob: float | None = None
    tier: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the request as a plain record."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a request from `to_json`."""
        return cls(**record)


def check_name(name: str) -> None:
    """Refuses what cannot be a model's name.

    Raises:
        InvalidRequestError: Not one or two plain parts, or a name that the HTTP interface uses.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            "A model name is letters, digits, '.', '_' and '-', beginning with a letter or digit, "
            "at most 96 characters, with at most one '/' between two such parts.",
            param="name",
        )
    if name.partition("/")[0] in RESERVED:
        raise InvalidRequestError(
            f"The names {', '.join(sorted(RESERVED))} are reserved; choose another.", param="name"
        )


def check_sharing(request: OnboardRequest) -> None:
    """Refuses contradictory sharing options.

    Raises:
        InvalidRequestError: One threshold without the other, thresholds beside a tier, an unknown
            tier, or options the policy does not take.
    """
    if (request.tau_cos is None) != (request.tau_frob is None):
        missing = "tau_cos" if request.tau_cos is None else "tau_frob"
        raise InvalidRequestError(
            "tau_cos and tau_frob are given together or not at all.", param=missing
        )
    if request.policy == "exact":
        for param in ("tau_cos", "tier"):
            if getattr(request, param) is not None:
                raise InvalidRequestError(f"The policy exact takes no {param}.", param=param)
    if request.tier is None:
        return
    if request.tau_cos is not None:
        raise InvalidRequestError("Give thresholds or a tier, not both.", param="tier")
    known = load_tiers()
    if request.tier not in known:
        raise InvalidRequestError(
            f"Unknown tier {request.tier!r:.60}; known are {', '.join(known)}.", param="tier"
        )
