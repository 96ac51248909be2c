"""Which donor was chosen for a model, and why, as operators see it. Chooses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linker_core.sharing.family import differences
from linker_core.sharing.report import Region
from linker_core.weights.architecture import ModelConfig
from server.onboarding.comparisons import Likeness
from server.residency.catalog import ServedModel

_MAX_SHOWN = 16  # donors that a reason lists
_MAX_DIFFERENCES = 3  # of each donor of another signature


@dataclass(frozen=True, slots=True, kw_only=True)
class DonorChoice:
    """The donor of a model, and why this one or none."""

    donor: ServedModel | None  # None: the model is the donor of a family of its own
    reason: str
    candidates: Sequence[Mapping[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the choice as plain JSON values.

        Of each candidate it holds mean_cos, mean_epsilon and region, or what it `differs` in, or
        the `error` that kept it from being read.
        """
        return {
            "donor": None if self.donor is None else self.donor.name,
            "reason": self.reason,
            "candidates": list(self.candidates[:_MAX_SHOWN]),
        }


def nearest(found: Sequence[tuple[ServedModel, Likeness]]) -> DonorChoice:
    """Returns the closest donor that is no stranger, or none.

    Args:
        found: Donors of the model's signature, at least one, in order of arrival.
    """
    assert found
    candidates = [_compared(*pair) for pair in found]
    near = [
        (likeness.mean_epsilon, index)
        for index, (_, likeness) in enumerate(found)
        if likeness.mean_epsilon is not None and likeness.region is not Region.OUTSIDE
    ]
    if near:
        donor, _ = found[min(near)[1]]
        reason = "It is the closest of the donors of this architecture and shape."
        return DonorChoice(donor=donor, reason=reason, candidates=candidates)
    reason = (
        "No donor of this architecture and shape is close enough (mean cos 0.97 or more, mean "
        "epsilon 0.25 or less), so the model gets a family of its own. Name a donor to share with "
        "it all the same."
    )
    return DonorChoice(donor=None, reason=reason, candidates=candidates)


def first_alike(donor: ServedModel) -> DonorChoice:
    """Returns the donor of a shape, which has no weights to compare."""
    reason = "It is the first donor of this architecture and shape; no weights were read."
    return DonorChoice(donor=donor, reason=reason)


def none_alike(donors: Sequence[ServedModel], config: ModelConfig) -> DonorChoice:
    """Returns that no donor has a model's signature, and what each differs in."""
    reason = (
        "No resident donor has this architecture and shape." if donors else "There is no donor."
    )
    differing = [
        {"donor": donor.name, "differs": differences(donor.text.config, config)[:_MAX_DIFFERENCES]}
        for donor in donors
    ]
    return DonorChoice(donor=None, reason=reason, candidates=differing)


def _compared(donor: ServedModel, likeness: Likeness) -> dict[str, Any]:
    if likeness.error is not None:
        return {"donor": donor.name, "error": likeness.error}
    return {
        "donor": donor.name,
        "mean_cos": likeness.mean_cos,
        "mean_epsilon": likeness.mean_epsilon,
        "region": likeness.region,
    }
