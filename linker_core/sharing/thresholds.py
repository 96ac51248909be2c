"""BS Eq. 3 and where its two numbers come from: the user, the boundary rule, a tier, or caution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from linker_core.errors import InvalidRequestError
from linker_core.sharing.report import BlockScan, ScanReport
from linker_core.weights.architecture import ModelConfig

BOUNDARY_EPSILON = 0.10  # BS appendix E, step 3: above it the family is a boundary case
TIERS_FILE = "families.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """τ_cos and τ_frob of BS Eq. 3, and why these."""

    tau_cos: float
    tau_frob: float
    source: str  # "explicit", "tier NAME", "boundary", "conservative", "fit" or "sweep"

    def shares(self, block: BlockScan) -> bool:
        """Share(i) of BS Eq. 3: sim(i) ≥ τ_cos and ε(i) ≤ τ_frob.

        Raises:
            InvalidRequestError: The block was sampled, and its bounds hold both answers.
        """
        answer = self.decide(block)
        if answer is None:
            raise InvalidRequestError(
                f"The sample cannot tell whether block {block.index} passes τ_cos {self.tau_cos} "
                f"and τ_frob {self.tau_frob}. Sample for these thresholds, or scan everything."
            )
        return answer

    def decide(self, block: BlockScan) -> bool | None:
        """Returns what `shares` does, or None where a sample leaves it open."""
        if block.bounds is None:
            return block.cos >= self.tau_cos and block.epsilon <= self.tau_frob
        cos, epsilon = block.bounds.cos, block.bounds.epsilon
        if cos.low >= self.tau_cos and epsilon.high <= self.tau_frob:
            return True
        if cos.high < self.tau_cos or epsilon.low > self.tau_frob:
            return False
        return None


CONSERVATIVE = Thresholds(tau_cos=0.999, tau_frob=0.05, source="conservative")
BOUNDARY = Thresholds(
    tau_cos=CONSERVATIVE.tau_cos, tau_frob=CONSERVATIVE.tau_frob, source="boundary"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One row of BS table 8."""

    name: str
    tau_cos: float
    tau_frob: float
    fingerprints: frozenset[str]  # donors this row may be used for unasked
    shape: Mapping[str, Any]  # fields of ModelConfig that only suggest the row


def load_tiers() -> dict[str, Tier]:
    """Returns the shipped tiers by name."""
    record = yaml.safe_load(files("configs").joinpath(TIERS_FILE).read_text("utf-8"))
    return {
        name: Tier(
            name=name,
            tau_cos=float(row["tau_cos"]),
            tau_frob=float(row["tau_frob"]),
            fingerprints=frozenset(row["fingerprints"]),
            shape=row["shape"],
        )
        for name, row in record["tiers"].items()
    }


def choose_thresholds(
    report: ScanReport,
    *,
    tau_cos: float | None = None,
    tau_frob: float | None = None,
    tier: str | None = None,
    donor_fingerprint: str | None = None,
) -> Thresholds:
    """Returns the thresholds that apply to a pair.

    Precedence: what the user states (both τ, or a tier by name) > the boundary rule of BS appendix
    E > a tier recognised by its donor's fingerprint > conservative.

    Args:
        report: Its mean ε decides about the boundary rule.
        tau_cos: Least cosine, within [-1, 1].
        tau_frob: Largest ε, at least 0.
        tier: Name of a row in families.yaml.
        donor_fingerprint: Looked up among the tiers' known donors.

    Raises:
        InvalidRequestError: One τ without the other, τ and a tier at once, an unknown tier, or a τ
            out of range.
    """
    tiers = load_tiers()
    if tau_cos is not None or tau_frob is not None:
        return _explicit(tau_cos, tau_frob, tier)
    if tier is not None:
        if tier not in tiers:
            raise InvalidRequestError(
                f"Unknown tier {tier!r:.60}; known are {', '.join(tiers)}.", param="tier"
            )
        return _of_tier(tiers[tier])
    if report.mean_epsilon > BOUNDARY_EPSILON:
        return BOUNDARY
    for candidate in tiers.values():
        if donor_fingerprint in candidate.fingerprints:
            return _of_tier(candidate)
    return CONSERVATIVE


def suggest_tier(config: ModelConfig) -> str | None:
    """Returns the tier whose models have this shape. Only a hint: anyone can copy a shape."""
    for tier in load_tiers().values():
        if all(getattr(config, field) == value for field, value in tier.shape.items()):
            return tier.name
    return None


def _explicit(tau_cos: float | None, tau_frob: float | None, tier: str | None) -> Thresholds:
    if tau_cos is None or tau_frob is None:
        missing = "tau_cos" if tau_cos is None else "tau_frob"
        raise InvalidRequestError(
            f"{missing} is missing: BS Eq. 3 needs both thresholds, or neither.", param=missing
        )
    if tier is not None:
        raise InvalidRequestError("Give thresholds or a tier, not both.", param="tier")
    if not -1.0 <= tau_cos <= 1.0:
        raise InvalidRequestError(f"tau_cos is {tau_cos}, expected -1 to 1.", param="tau_cos")
    if not 0.0 <= tau_frob < float("inf"):
        raise InvalidRequestError(f"tau_frob is {tau_frob}, expected 0 or more.", param="tau_frob")
    return Thresholds(tau_cos=tau_cos, tau_frob=tau_frob, source="explicit")


def _of_tier(tier: Tier) -> Thresholds:
    return Thresholds(tau_cos=tier.tau_cos, tau_frob=tier.tau_frob, source=f"tier {tier.name}")
