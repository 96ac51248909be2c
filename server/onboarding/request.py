"""What an operator asks for: a name, a source and how to share. Names are checked here."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from linker_core.errors import InvalidRequestError
from linker_core.sharing.plan import Policy
from linker_core.sharing.thresholds import load_tiers
from linker_core.tuning.request import DEFAULT_BUDGET_KL
from server.settings import POLICIES, SharingSettings

AUTO_DONOR = "auto"
RESERVED = frozenset({"jobs", "events", "plan", "load", "unload"})
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"{_PART}(/{_PART})?", re.ASCII)
_THRESHOLDS = ("tau_cos", "tau_frob", "tier")
# The options that each policy takes.
_TAKEN: Mapping[str, frozenset[str]] = {
    Policy.BUDGET: frozenset({"budget_kl"}),
    Policy.THRESHOLDS: frozenset({*_THRESHOLDS, "budget_kl"}),
    Policy.BYTES: frozenset({"max_bytes"}),
    Policy.EXACT: frozenset(),
    Policy.DELTA: frozenset(),
    Policy.ADAPTER: frozenset(),
}
# The largest that each number may be, and what it may be in words.
_RANGES: Mapping[str, tuple[float, str]] = {
    "tau_cos": (1, "a number from 0 to 1"),
    "tau_frob": (sys.float_info.max, "a finite number, 0 or more"),
    "budget_kl": (sys.float_info.max, "nats per response token, 0 or more and finite"),
    "max_bytes": (2**63 - 1, "bytes, 0 or more and below 2^63"),
}
SHARING_OPTIONS = (*_THRESHOLDS, "budget_kl", "max_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnboardRequest:
    """One model to onboard. Two requests are identical iff they are equal once resolved."""

    name: str
    source: str
    donor: str | None = AUTO_DONOR  # a model, "auto", or None: a family of its own
    policy: str = Policy.BUDGET.value
    tau_cos: float | None = None
    tau_frob: float | None = None
    tier: str | None = None
    budget_kl: float | None = None  # nats per response token
    max_bytes: int | None = None  # unique bytes

    def to_json(self) -> dict[str, Any]:
        """Returns the request as a plain record."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a request from `to_json`."""
        return cls(**record)


def check_name(name: str, *, param: str = "name") -> None:
    """Refuses what cannot be a model's name.

    Args:
        name: What a model is to be called.
        param: The field of a request that said so.

    Raises:
        InvalidRequestError: Not one or two plain parts, or a name that the HTTP interface uses.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            "A model name is letters, digits, '.', '_' and '-', beginning with a letter or digit, "
            "at most 96 characters, with at most one '/' between two such parts.",
            param=param,
        )
    if name.partition("/")[0] in RESERVED:
        raise InvalidRequestError(
            f"The names {', '.join(sorted(RESERVED))} are reserved; choose another.", param=param
        )


def resolve_sharing(said: Mapping[str, Any], defaults: SharingSettings) -> dict[str, Any]:
    """Returns policy and options of a request, what it leaves open filled in.

    Without a policy, thresholds or a tier mean `thresholds`, a size `bytes`, a budget `budget`, and
    nothing at all the settings' policy, which is found in the same way and is `budget` in the end.
    The settings' options serve where their policy is used.

    Args:
        said: `policy` and options; what is None or absent is left open.
        defaults: The settings.
    """
    standing = defaults.policy or implied_policy(defaults.model_dump()) or Policy.BUDGET.value
    policy = said.get("policy") or implied_policy(said) or standing
    options = {option: said.get(option) for option in SHARING_OPTIONS}
    if policy == standing:
        for group in (_THRESHOLDS, ("budget_kl",), ("max_bytes",)):
            if all(options[option] is None for option in group):
                options |= {option: getattr(defaults, option) for option in group}
    if policy == Policy.BUDGET and options["budget_kl"] is None:
        options["budget_kl"] = DEFAULT_BUDGET_KL
    return {"policy": policy, **options}


def implied_policy(said: Mapping[str, Any]) -> str | None:
    """Returns the policy that options stand for where none is named, or None without options."""
    if any(said.get(option) is not None for option in _THRESHOLDS):
        return Policy.THRESHOLDS.value
    if said.get("max_bytes") is not None:
        return Policy.BYTES.value
    return None if said.get("budget_kl") is None else Policy.BUDGET.value


def check_sharing(request: OnboardRequest) -> None:
    """Refuses contradictory sharing options.

    Raises:
        InvalidRequestError: A number out of range, options that the policy does not take, one
            threshold without the other, thresholds beside a tier, an unknown tier, or policy bytes
            without a size.
    """
    for option, (most, expected) in _RANGES.items():
        value = getattr(request, option)
        if value is not None and not 0 <= value <= most:  # NaN is in no range
            raise InvalidRequestError(f"{option} is {value}, expected {expected}.", param=option)
    if (request.tau_cos is None) != (request.tau_frob is None):
        missing = "tau_cos" if request.tau_cos is None else "tau_frob"
        raise InvalidRequestError(
            "tau_cos and tau_frob are given together or not at all.", param=missing
        )
    for option in SHARING_OPTIONS:
        if getattr(request, option) is not None and option not in _TAKEN[request.policy]:
            takers = " and ".join(policy for policy in POLICIES if option in _TAKEN[policy])
            raise InvalidRequestError(
                f"The policy {request.policy} takes no {option}; {takers} would.", param=option
            )
    if request.policy == Policy.BYTES and request.max_bytes is None:
        raise InvalidRequestError(
            "The policy bytes needs max_bytes: what the model may hold to itself.",
            param="max_bytes",
        )
    _check_tier(request)


def own_plan_request(
    request: OnboardRequest, said: Mapping[str, Any], policy: Policy
) -> OnboardRequest:
    """Returns the request for a source that brings its own plan.

    Args:
        request: As for a checkpoint, defaults filled in.
        said: What was asked for.
        policy: DELTA or ADAPTER.

    Raises:
        InvalidRequestError: A policy or an option that would choose another plan.
    """
    for option in ("policy", *SHARING_OPTIONS):
        if said.get(option) is None:
            continue
        if option == "budget_kl" and policy is Policy.DELTA:
            raise InvalidRequestError(
                "The price of a delta is its exporter's claim, against which no budget is held. "
                "Leave budget_kl out, or onboard the variant's checkpoint to have it measured.",
                param=option,
            )
        raise InvalidRequestError(
            f"A source of kind {policy} brings its own plan, so {option} has no meaning. Leave "
            "it out, or onboard the variant's checkpoint.",
            param=option,
        )
    left_out: dict[str, Any] = dict.fromkeys(SHARING_OPTIONS)
    return replace(request, policy=policy.value, **left_out)


def _check_tier(request: OnboardRequest) -> None:
    if request.tier is None:
        return
    if request.tau_cos is not None:
        raise InvalidRequestError("Give thresholds or a tier, not both.", param="tier")
    known = load_tiers()
    if request.tier not in known:
        raise InvalidRequestError(
            f"Unknown tier {request.tier!r:.60}; known are {', '.join(known)}.", param="tier"
        )
