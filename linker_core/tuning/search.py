"""Chooses which candidates to price, and which of the priced plans to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from linker_core.errors import InvalidRequestError
from linker_core.sharing.rungs import Rung
from linker_core.sharing.thresholds import Thresholds
from linker_core.tuning.candidates import (
    ALL_BLOCKS,
    Candidate,
    Candidates,
    harm_for,
)
from linker_core.tuning.memory import MAX_PLANS_AT_ONCE
from linker_core.tuning.pricing import Pricer
from linker_core.tuning.result import PricedPlan
from linker_core.tuning.storages import Rungs

MAX_PASSES = 7.6  # forward passes that prices may take: eight less what sensitivities took
_NUM_BLOCK_SETS = MAX_PLANS_AT_ONCE - 1  # one prefix may go with them
_AIM = 0.85  # of the budget: what is aimed at must still pass on its interval's upper end
_FIRST_SPREAD = (0.6, 1.5)  # of the harm that is guessed from all blocks alone
_SPREAD_BITS = (0.5, 5.0)  # a weight: the least and the most that a joint choice can use


class Search:
    """The plans of one pair that have been priced, and what to price next.

    Args:
        unchanged: The plan that changes no bit; its price is known.
        pricer: Measures.
        unique_bytes: Of a choice of rungs.
    """

    def __init__(
        self, unchanged: PricedPlan, pricer: Pricer, unique_bytes: Callable[[Rungs], int]
    ) -> None:
        self._unchanged = unchanged
        self._pricer = pricer
        self._unique_bytes = unique_bytes
        self.priced = [unchanged]

    def within_budget(
        self, candidates: Candidates, thresholds: Thresholds, budget_kl: float
    ) -> PricedPlan:
        """Prices BS's block sets, then closes in on a budget along the order of least harm.

        Returns:
            The smallest plan whose interval's upper end stays within the budget, which is above 0.
        """
        if not candidates.order:
            return self._unchanged
        self.price(candidates.blocks(thresholds)[:_NUM_BLOCK_SETS])
        spread: Sequence[float] = _FIRST_SPREAD
        while self._pricer.forward_passes + len(spread) <= MAX_PASSES:
            lengths = {self._next_length(candidates, budget_kl, factor) for factor in spread}
            if None in lengths:
                break
            self.price([candidates.prefix(length) for length in lengths if length is not None])
            spread = (1.0,)
        within = [plan for plan in self.priced if plan.price.kl_upper <= budget_kl]
        return min(within, key=lambda plan: (plan.unique_bytes, plan.price.kl))

    def within_bytes(
        self, candidates: Candidates, thresholds: Thresholds, max_bytes: int
    ) -> PricedPlan:
        """Prices BS's block sets and the shortest prefix that is small enough.

        Returns:
            The plan of lowest KL among those that fit.

        Raises:
            InvalidRequestError: Nothing is as small as asked for.
        """
        if self._unchanged.unique_bytes <= max_bytes:
            return self._unchanged
        prefixes = [candidates.prefix(length) for length in range(len(candidates.order) + 1)]
        fitting = [plan for plan in prefixes if self._unique_bytes(plan.rungs) <= max_bytes]
        if not fitting:
            least = min(self._unique_bytes(plan.rungs) for plan in prefixes)
            raise InvalidRequestError(
                f"max_bytes is {max_bytes}, but {least} bytes are the variant's own however much "
                "is shared.",
                param="max_bytes",
            )
        self.price([*candidates.blocks(thresholds)[:_NUM_BLOCK_SETS], fitting[0]])
        within = [plan for plan in self.priced if plan.unique_bytes <= max_bytes]
        return min(within, key=lambda plan: (plan.price.kl, plan.unique_bytes))

    def spread(self, candidates: Candidates, num_points: int, num_weights: int) -> PricedPlan:
        """Prices plans of least harm from few bytes to many, each a step of the same factor.

        Args:
            candidates: Of the pair.
            num_points: How many; fewer where two of them are one.
            num_weights: Of the variant.

        Returns:
            The plan that changes no bit.
        """
        prefixes = [candidates.prefix(length) for length in range(len(candidates.order) + 1)]
        sizes = [self._unique_bytes(plan.rungs) for plan in prefixes]
        wanted = np.geomspace(*_SPREAD_BITS, num_points) * num_weights / 8
        places = {min(range(len(sizes)), key=lambda i: abs(sizes[i] - want)) for want in wanted}
        chosen = [prefixes[place] for place in sorted(places)]
        for start in range(0, len(chosen), MAX_PLANS_AT_ONCE):
            self.price(chosen[start : start + MAX_PLANS_AT_ONCE])
        return self._unchanged

    def price(self, candidates: Sequence[Candidate]) -> None:
        """Prices what has not been priced yet, all in one walk."""
        known = [plan.rungs for plan in self.priced]
        fresh = [candidate for candidate in candidates if candidate.rungs not in known]
        prices = self._pricer.price([candidate.rungs for candidate in fresh])
        self.priced += [
            PricedPlan(
                origin=candidate.origin,
                rungs=candidate.rungs,
                unique_bytes=self._unique_bytes(candidate.rungs),
                price=price,
            )
            for candidate, price in zip(fresh, prices, strict=True)
        ]

    def _next_length(self, candidates: Candidates, budget_kl: float, factor: float) -> int | None:
        """Returns the prefix to price next, between those that passed and those that did not.

        None if there is none between them, or nothing to guess from.
        """
        measured_at = dict(self._priced_prefixes(candidates))
        passed = max((n for n, (_, kl) in measured_at.items() if kl <= budget_kl), default=0)
        failed = [n for n, (_, kl) in measured_at.items() if kl > budget_kl and n > passed]
        most = min(failed, default=len(candidates.order) + 1) - 1
        if most <= passed:
            return None
        whole = [plan for plan in self.priced if plan.origin == ALL_BLOCKS]
        guides = list(measured_at.values()) or [
            (candidates.harm(plan.rungs), plan.price.kl_upper) for plan in whole
        ]
        measured = [guide for guide in guides if min(guide) > 0]
        if not measured:
            return most  # nothing that was aliased changed anything: try all of it
        guess = candidates.prefix_of_harm(factor * harm_for(_AIM * budget_kl, measured))
        return min(max(guess, passed + 1), most)

    def _priced_prefixes(self, candidates: Candidates) -> Iterator[tuple[int, tuple[float, float]]]:
        """Yields length, harm and upper KL of every priced plan that is a prefix of the order."""
        for plan in self.priced:
            aliased = [s for s in candidates.order if plan.rungs[s.name] is Rung.ALIAS]
            if aliased and plan.rungs == candidates.prefix(len(aliased)).rungs:
                yield len(aliased), (candidates.harm(plan.rungs), plan.price.kl_upper)
