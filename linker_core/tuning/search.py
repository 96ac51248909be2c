"""Chooses which candidates to price, and which of the priced plans to take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from linker_core.sharing.thresholds import Thresholds
from linker_core.tuning.candidates import ALL_BLOCKS, Candidate, Candidates, harm_for
from linker_core.tuning.least import beyond_reach
from linker_core.tuning.memory import MAX_PLANS_AT_ONCE
from linker_core.tuning.pricing import Pricer
from linker_core.tuning.result import PricedPlan
from linker_core.tuning.storages import Rungs

MAX_PASSES = 7.6  # forward passes that prices may take: eight less what sensitivities took
_NUM_BLOCK_SETS = 2  # that tell what aliases alone cost
_AIM = 0.85  # of the budget: what is aimed at must still pass on its interval's upper end
# Kept from a plan that passed and from one that did not, of the logarithm of their bytes' ratio.
_MARGIN = 0.2
_NATS_PER_HARM = 6.0  # before anything is measured; 4 to 8 on trained models
_FIRST_SPREAD = (0.6, 1.2)  # of the harm that is guessed from it
# How plans of one size are varied: harm is a guide, and the ends of the model and its two sublayers
# may count more or less than it says.
_WAYS: Mapping[str, Mapping[str, float]] = {
    "least harm": {},
    "least harm, embedding and head spared": {"embed_tokens": 4.0, "lm_head": 4.0},
    "least harm, blocks spared": {"embed_tokens": 0.25, "lm_head": 0.25},
    "least harm, attention spared": {"self_attn": 4.0},
}
_SPREAD_BITS = (0.5, 5.0)  # a weight: the least and the most that a joint choice can use


class Search:
    """The plans of one pair that have been priced, and what to price next.

    Args:
        unchanged: The plan that changes no bit; its price is known.
        pricer: Measures.
        rung_bytes: Of a choice of rungs: unique bytes by kind.
    """

    def __init__(
        self,
        unchanged: PricedPlan,
        pricer: Pricer,
        rung_bytes: Callable[[Rungs], Mapping[str, int]],
    ) -> None:
        self._unchanged = unchanged
        self._pricer = pricer
        self._rung_bytes = rung_bytes
        self.priced = [unchanged]
        self._measured: dict[int, tuple[float, float]] = {}  # steps of the chain -> harm, upper KL

    def within_budget(
        self, candidates: Candidates, thresholds: Thresholds, budget_kl: float
    ) -> PricedPlan:
        """Prices some plans of aliases alone, then closes in on a budget along the chain.

        Returns:
            The smallest plan whose interval's upper end stays within the budget, which is above 0.
        """
        if not candidates.chain.steps:
            return self._unchanged
        aim = _AIM * budget_kl
        guesses = [candidates.chain.length_of_harm(f * aim / _NATS_PER_HARM) for f in _FIRST_SPREAD]
        block_sets = candidates.blocks(thresholds)[:_NUM_BLOCK_SETS]
        self._price_chain(candidates, {max(1, guess) for guess in guesses}, block_sets)
        without = self._aliases_alone(candidates, aim)
        while self._pricer.forward_passes + 1 + len(without) <= MAX_PASSES:
            length = self._next_length(candidates, budget_kl)
            if length is None:
                break
            self._price_chain(candidates, {length}, without)
            without = []
        within = [plan for plan in self._eligible(candidates) if plan.price.kl_upper <= budget_kl]
        return min(within, key=lambda plan: (plan.unique_bytes, plan.price.kl))

    def within_bytes(
        self, candidates: Candidates, thresholds: Thresholds, max_bytes: int
    ) -> PricedPlan:
        """Prices the plans of least harm that are small enough, and BS's block sets.

        Returns:
            The plan of lowest KL among those that fit.

        Raises:
            InvalidRequestError: Nothing is as small as asked for.
        """
        excess = self._unchanged.unique_bytes - max_bytes
        if excess <= 0:
            return self._unchanged
        if excess > candidates.chain.most_saved:
            least = self._unchanged.unique_bytes - candidates.chain.most_saved
            raise beyond_reach(max_bytes, least)
        ways = {origin: candidates.weighted(weights) for origin, weights in _WAYS.items()}
        self.price(
            [
                *(
                    Candidate(origin=origin, rungs=way.saving(excess))
                    for origin, way in ways.items()
                ),
                *candidates.blocks(thresholds)[:_NUM_BLOCK_SETS],
            ]
        )
        within = [plan for plan in self._eligible(candidates) if plan.unique_bytes <= max_bytes]
        return min(within, key=lambda plan: (plan.price.kl, plan.unique_bytes))

    def spread(self, candidates: Candidates, num_points: int, num_weights: int) -> PricedPlan:
        """Prices plans of least harm from few bytes to many, each a step of the same factor.

        The smallest plan of all is priced as well: less the variant cannot hold.

        Args:
            candidates: Of the pair.
            num_points: How many beside that one; fewer where two of them are one.
            num_weights: Of the variant.

        Returns:
            The plan that changes no bit.
        """
        sizes = np.geomspace(*_SPREAD_BITS, num_points) * num_weights / 8
        excesses = [self._unchanged.unique_bytes - int(size) for size in sizes]
        chain = candidates.chain
        sized = [
            Candidate(
                origin=f"least harm at {8 * size / num_weights:.2f} bits",
                rungs=chain.saving(excess),
            )
            for size, excess in zip(sizes, excesses, strict=True)
            if 0 < excess < chain.most_saved
        ]
        self.price([Candidate(origin="least bytes", rungs=chain.rungs(len(chain.steps))), *sized])
        return self._unchanged

    def price(self, candidates: Iterable[Candidate]) -> None:
        """Prices what has not been priced yet, as many in a walk as memory was reserved for."""
        fresh: list[Candidate] = []
        known = [plan.rungs for plan in self.priced]
        for candidate in candidates:
            if candidate.rungs not in known:
                fresh.append(candidate)
                known.append(candidate.rungs)
        for start in range(0, len(fresh), MAX_PLANS_AT_ONCE):
            group = fresh[start : start + MAX_PLANS_AT_ONCE]
            prices = self._pricer.price([candidate.rungs for candidate in group])
            self.priced += [
                PricedPlan(
                    origin=candidate.origin,
                    rungs=candidate.rungs,
                    rung_bytes=self._rung_bytes(candidate.rungs),
                    price=price,
                )
                for candidate, price in zip(group, prices, strict=True)
            ]

    def _price_chain(
        self, candidates: Candidates, lengths: Collection[int], others: Sequence[Candidate]
    ) -> None:
        """Prices plans of the chain, and others in the same walk."""
        chain = candidates.chain
        prefixes = {
            length: Candidate(origin=f"{length} steps of least harm", rungs=chain.rungs(length))
            for length in sorted(lengths)
        }
        self.price([*prefixes.values(), *others])
        for length, prefix in prefixes.items():
            (plan,) = (plan for plan in self.priced if plan.rungs == prefix.rungs)
            self._measured[length] = candidates.harm(plan.rungs), plan.price.kl_upper

    def _next_length(self, candidates: Candidates, budget_kl: float) -> int | None:
        """Returns the steps to price next, between those that passed and those that did not.

        None if there are none between them.
        """
        passed = max((n for n, (_, kl) in self._measured.items() if kl <= budget_kl), default=0)
        failed = [n for n, (_, kl) in self._measured.items() if kl > budget_kl and n > passed]
        most = min(failed, default=len(candidates.chain.steps) + 1) - 1
        if most <= passed:
            return None
        measured = [point for point in self._measured.values() if min(point) > 0]
        if not measured:
            return most  # nothing that was changed did any harm: try all of it
        guess = candidates.chain.length_of_harm(harm_for(_AIM * budget_kl, measured))
        if failed and passed:
            # A guess beside either end tells little when it turns out as expected.
            guess = candidates.chain.between(passed, most + 1, guess, margin=_MARGIN)
        return min(max(guess, passed + 1), most)

    def _aliases_alone(self, candidates: Candidates, aim: float) -> list[Candidate]:
        """Returns the plan without residuals that may cost what is aimed at, if one can be told."""
        whole = [plan for plan in self.priced if plan.origin == ALL_BLOCKS]
        points = [(candidates.harm(plan.rungs), plan.price.kl) for plan in whole]
        points = [point for point in points if min(point) > 0]
        if not points:
            return []
        without = candidates.without_residuals()
        length = without.length_of_harm(harm_for(aim, points))
        origin = f"{length} weights aliased, without residuals"
        return [Candidate(origin=origin, rungs=without.rungs(length))] if length else []

    def _eligible(self, candidates: Candidates) -> list[PricedPlan]:
        return [plan for plan in self.priced if candidates.may_be_chosen(plan.rungs)]
