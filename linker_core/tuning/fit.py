"""Which plan of each variant, so that all of them fit into a size together. Plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class FitPoint(NamedTuple):
    """A plan of one variant, as far as a choice among several has to know it."""

    unique_bytes: int
    kl: float  # nats per response token


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A point for each variant, by its place in that variant's frontier."""

    chosen: Mapping[str, int]  # of the variants that fit
    left_out: tuple[str, ...]  # those that do not, whatever is chosen for them
    unique_bytes: int  # of what is chosen
    least_bytes: int  # that all of them need, each at its smallest

    @property
    def fits(self) -> bool:
        return not self.left_out


class _Choice(NamedTuple):
    """Points of some variants."""

    unique_bytes: int
    kl: float  # sum
    places: tuple[int, ...]


def fit(frontiers: Mapping[str, Sequence[FitPoint]], budget_bytes: int) -> Fit:
    """Chooses a point for every variant within a size.

    The worst KL is as small as it can be, and then the mean; of equals the smallest is taken. If
    not even the smallest points fit together, as many variants as can be are kept, the smallest
    first, and the others left out. So a frontier has to reach down to the least that its variant
    can hold.

    Args:
        frontiers: The points of each variant, in any order; each has at least one.
        budget_bytes: For the unique bytes of all of them.
    """
    assert all(frontiers.values())
    least = {name: min(p.unique_bytes for p in points) for name, points in frontiers.items()}
    kept: list[str] = []
    for name in sorted(least, key=least.__getitem__):
        if sum(least[one] for one in kept) + least[name] <= budget_bytes:
            kept.append(name)
    names = [name for name in frontiers if name in kept]
    choice = _best([frontiers[name] for name in names], budget_bytes)
    return Fit(
        chosen=dict(zip(names, choice.places, strict=True)),
        left_out=tuple(name for name in frontiers if name not in kept),
        unique_bytes=choice.unique_bytes,
        least_bytes=sum(least.values()),
    )


def _best(frontiers: Sequence[Sequence[FitPoint]], budget_bytes: int) -> _Choice:
    """Returns the choice of least worst KL, then of least mean, then of least bytes.

    Exact: with the worst KL bounded, one variant after the other joins, and of the choices so far
    only those stay that no other beats in both bytes and KL.
    """
    worst = _least_worst(frontiers, budget_bytes)
    # The bytes that those who have not joined yet need at least.
    needed = [_least_bytes(points, worst) for points in frontiers]
    choices = [_Choice(0, 0.0, ())]
    for number, points in enumerate(frontiers):
        room = budget_bytes - sum(needed[number + 1 :])
        joined = [
            _Choice(so_far.unique_bytes + p.unique_bytes, so_far.kl + p.kl, (*so_far.places, place))
            for so_far in choices
            for place, p in enumerate(points)
            if p.kl <= worst and so_far.unique_bytes + p.unique_bytes <= room
        ]
        choices = _undominated(joined)
    return choices[-1]  # the dearest has the least KL


def _least_worst(frontiers: Sequence[Sequence[FitPoint]], budget_bytes: int) -> float:
    """Returns the least bound on every KL under which the smallest points fit together."""
    bounds = sorted({point.kl for points in frontiers for point in points})
    for bound in bounds:
        if sum(_least_bytes(points, bound) for points in frontiers) <= budget_bytes:
            return bound
    assert not frontiers, "the smallest points fit"
    return 0.0


def _least_bytes(points: Sequence[FitPoint], worst: float) -> float:
    return min((p.unique_bytes for p in points if p.kl <= worst), default=math.inf)


def _undominated(choices: list[_Choice]) -> list[_Choice]:
    """Returns those of which no other has as few bytes and as little KL, by rising bytes."""
    found: list[_Choice] = []
    for choice in sorted(choices):
        if not found or choice.kl < found[-1].kl:
            found.append(choice)
    return found
