"""Rungs for many matrices from their bytes and errors: a multiple-choice knapsack, greedily.

Of each matrix only the lower convex hull of its rungs is of use; with all steps along the hulls
merged by harm per byte, every plan on the way is the best of its size (Sinha and Zoltners 1979).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from linker_core.sharing.rungs import AnyRung


class Offer(NamedTuple):
    """A rung of one matrix."""

    nbytes: int
    error: float
    rung: AnyRung


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One matrix goes to a cheaper rung."""

    name: str
    rung: AnyRung
    saved: int  # bytes, above 0
    harm: float  # 0 or more
    steepness: float  # harm per byte, and not below that of the step of this matrix before


class Chain:
    """The plans from the rungs that change no bit to the cheapest ones, least harm first.

    Args:
        base: Where it starts.
        standing: Bytes on these rungs of every matrix that has offers.
        offers: Its other rungs, by matrix.
    """

    def __init__(
        self,
        base: Mapping[str, AnyRung],
        standing: Mapping[str, int],
        offers: Mapping[str, Iterable[Offer]],
    ) -> None:
        self._base = base
        self._standing = sum(standing[name] for name in offers)
        steps = [step for name in offers for step in _steps(name, standing[name], offers[name])]
        self.steps = tuple(sorted(steps, key=lambda step: step.steepness))
        self._harms = list(accumulate((step.harm for step in self.steps), initial=0.0))
        self._saved = list(accumulate((step.saved for step in self.steps), initial=0))

    @property
    def most_saved(self) -> int:
        """Bytes between its ends."""
        return self._saved[-1]

    def rungs(self, length: int) -> dict[str, AnyRung]:
        """Returns the plan after so many steps."""
        return {**self._base, **{step.name: step.rung for step in self.steps[:length]}}

    def length_of_harm(self, harm: float) -> int:
        """Returns the number of steps that do at most so much harm together."""
        return bisect_right(self._harms, harm) - 1

    def between(self, fewer: int, more: int, guess: int, *, margin: float) -> int:
        """Returns the number of steps next to `guess` that keeps clear of two others.

        Args:
            fewer: One of them.
            more: The other, above it.
            guess: What is moved, if need be.
            margin: What to keep from either, of the logarithm of the bytes' ratio; below a half.
        """
        held = [self._standing - saved + 1 for saved in self._saved]  # never 0
        ratio = (held[more] / held[fewer]) ** margin
        clear = [
            n for n in range(fewer, more) if held[more] / ratio <= held[n] <= held[fewer] * ratio
        ]
        return (
            min(max(guess, clear[0]), clear[-1]) if clear else min(max(guess, fewer + 1), more - 1)
        )

    def saving(self, saved: int) -> dict[str, AnyRung]:
        """Returns a plan that saves at least so many bytes, of at most `most_saved`.

        From the first plan that does, what is not needed goes to matrices whose last step can be
        taken back, the one of most harm per byte first.
        """
        assert saved <= self.most_saved
        length = bisect_left(self._saved, saved)
        spare = self._saved[length] - saved
        taken = list(self.steps[:length])
        lowest = set[str]()
        for step in reversed(self.steps[:length]):
            if step.saved <= spare and step.name not in lowest:
                spare -= step.saved
                taken.remove(step)
            else:
                lowest.add(step.name)  # what came before this step stays taken
        return {**self._base, **{step.name: step.rung for step in taken}}


def _steps(name: str, standing: int, offers: Iterable[Offer]) -> list[Step]:
    """Returns one matrix' way down its hull."""
    steps: list[Step] = []
    nbytes = standing
    error = steepness = 0.0
    rest = list(offers)
    while rest := [offer for offer in rest if offer.nbytes < nbytes]:
        # The next corner of the hull: where the way down is flattest, and of those the farthest.
        best = min(rest, key=lambda offer: (_slope(nbytes, error, offer), offer.nbytes))
        steepness = max(steepness, _slope(nbytes, error, best))  # however that is rounded
        steps.append(
            Step(
                name=name,
                rung=best.rung,
                saved=nbytes - best.nbytes,
                harm=best.error - error,
                steepness=steepness,
            )
        )
        nbytes, error = best.nbytes, best.error
    return steps


def _slope(nbytes: int, error: float, offer: Offer) -> float:
    return (offer.error - error) / (nbytes - offer.nbytes)
