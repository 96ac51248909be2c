"""Budget -> plan: measure what each swap does, price candidates, choose (DESIGN's single pass).

Runs in a process of its own. The bytes it holds are those of `tuning.memory`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from linker_core.errors import InvalidRequestError
from linker_core.pace import Pace
from linker_core.sharing.plan import Rung, plan_bytes
from linker_core.sharing.planner import count_own_rows, identical_rungs
from linker_core.sharing.price import Price
from linker_core.sharing.report import Region, ScanReport
from linker_core.sharing.thresholds import choose_thresholds
from linker_core.tuning.calibration import CalibrationText
from linker_core.tuning.candidates import (
    ALL_BLOCKS,
    OF_LEAST_HARM,
    Candidate,
    Candidates,
    harm_for,
)
from linker_core.tuning.pricing import Pricer
from linker_core.tuning.request import TuneRequest
from linker_core.tuning.result import PricedPlan, TuneResult
from linker_core.tuning.sensitivity import measure_sensitivities
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.texts import calibration_text
from linker_core.tuning.walk import Walk
from linker_core.weights.checkpoint import Checkpoint

UNCHANGED = "identical bytes alone"
_NUM_READS = 4  # of both checkpoints: sensitivities and three rounds of prices
_SAMPLED = 4  # every so many sequences tell sensitivities
_AIM = 0.85  # of the budget: what is aimed at must still pass on its interval's upper end

Progress = Callable[[int, int], None]  # bytes read, bytes to read


def tune(
    request: TuneRequest, *, progress: Progress | None = None, pace: Pace | None = None
) -> TuneResult:
    """Prices plans of a pair and chooses one.

    Args:
        request: Which pair, towards what, on which text.
        progress: Called with bytes read and (about) all bytes to read.
        pace: Slows the work down while sequences run.

    Raises:
        BadCheckpointError: A checkpoint is damaged or changed.
        InvalidRequestError: A goal that cannot be reached, or a calibration text of no use.
    """
    with ExitStack() as stack:
        donor = stack.enter_context(Checkpoint.open(Path(request.donor)))
        variant = stack.enter_context(Checkpoint.open(Path(request.variant)))
        return Tuner(request, donor, variant, progress=progress, pace=pace or Pace()).run()


class Tuner:
    """One run of the tuner over two open checkpoints."""

    def __init__(
        self,
        request: TuneRequest,
        donor: Checkpoint,
        variant: Checkpoint,
        *,
        progress: Progress | None,
        pace: Pace,
    ) -> None:
        request.goal.check()
        self._started = time.monotonic()
        self._goal = request.goal
        self._donor_fingerprint = request.donor_fingerprint
        self._donor, self._variant = donor, variant
        self._report = ScanReport.from_json(request.report)
        self._device = torch.device(request.device)
        self._pace = pace
        self._base = identical_rungs(self._report, donor, variant)
        self._text = calibration_text(
            variant, request.calibration, device=request.device, pace=pace
        )
        self._meter = _Meter(_NUM_READS * (donor.nbytes + variant.nbytes), progress)
        self._reader = SectionReader(
            donor,
            variant,
            identical=frozenset(n for n, rung in self._base.items() if rung is Rung.ALIAS),
            device=self._device,
            on_read=self._meter.add,
        )
        self._pricer = Pricer(self._walk(self._text), self._reader, self._base, self._text)
        self._priced: list[PricedPlan] = [self._plan(UNCHANGED, self._base, self._unchanged())]

    def run(self) -> TuneResult:
        """Returns every plan that was priced, and the choice.

        Raises:
            InvalidRequestError: Nothing is as small as asked for.
        """
        if self._goal.rungs is not None:
            given = {name: Rung(rung) for name, rung in self._goal.rungs.items()}
            self._price([Candidate(origin="given", rungs=given)])
            return self._result(self._priced[-1])
        candidates = self._candidates()
        if self._goal.budget_kl is not None:
            self._seek_budget(candidates, self._goal.budget_kl)
            return self._result(self._cheapest_within(self._goal.budget_kl))
        assert self._goal.max_bytes is not None
        return self._result(self._best_of_size(candidates, self._goal.max_bytes))

    def _candidates(self) -> Candidates:
        sequences = self._text.sequences[::_SAMPLED]
        walk = self._walk(self._text, every=_SAMPLED)
        token_ids = [token for sequence in sequences for token in sequence.token_ids]
        return Candidates(
            base=self._base,
            report=self._report,
            donor=self._donor,
            variant=self._variant,
            sensitivities=measure_sensitivities(walk, self._reader, self._base, token_ids),
        )

    def _seek_budget(self, candidates: Candidates, budget_kl: float) -> None:
        """Prices BS's block sets, then closes in on the budget along the order of least harm."""
        thresholds = choose_thresholds(self._report, donor_fingerprint=self._donor_fingerprint)
        self._price(candidates.blocks(thresholds)[:3])
        if budget_kl == 0.0 or not candidates.order:
            return
        for spread in ((0.6, 1.5), (1.0,)):
            measured = self._measured(candidates)
            if not measured:
                return  # nothing that was aliased changed anything
            harm = harm_for(_AIM * budget_kl, measured)
            lengths = {max(1, candidates.prefix_of_harm(factor * harm)) for factor in spread}
            self._price([candidates.prefix(length) for length in sorted(lengths)])

    def _measured(self, candidates: Candidates) -> list[tuple[float, float]]:
        """Returns harm and upper KL of the prefixes that were priced; before, of all blocks."""
        prefixes = [plan for plan in self._priced if plan.origin.endswith(OF_LEAST_HARM)]
        guides = prefixes or [plan for plan in self._priced if plan.origin == ALL_BLOCKS]
        points = [(candidates.harm(plan.rungs), plan.price.kl_upper) for plan in guides]
        return [point for point in points if min(point) > 0]

    def _cheapest_within(self, budget_kl: float) -> PricedPlan:
        """Returns the smallest plan whose interval's upper end stays within the budget.

        A variant outside the family's neighbourhood shares only what is byte-identical, however
        little a swap seems to cost on this text.
        """
        if self._report.region is Region.OUTSIDE:
            return self._priced[0]
        within = [plan for plan in self._priced if plan.price.kl_upper <= budget_kl]
        return min(within, key=lambda plan: (plan.unique_bytes, plan.price.kl))

    def _best_of_size(self, candidates: Candidates, max_bytes: int) -> PricedPlan:
        """Returns the plan of lowest KL among those that fit."""
        plans = [candidates.prefix(length) for length in range(len(candidates.order) + 1)]
        fitting = [plan for plan in plans if self._unique_bytes(plan.rungs) <= max_bytes]
        if not fitting:
            least = min(self._unique_bytes(plan.rungs) for plan in plans)
            raise InvalidRequestError(
                f"max_bytes is {max_bytes}, but {least} bytes are the variant's own however much "
                "is shared.",
                param="max_bytes",
            )
        thresholds = choose_thresholds(self._report, donor_fingerprint=self._donor_fingerprint)
        self._price([*candidates.blocks(thresholds)[:3], *fitting[:1]])
        within = [plan for plan in self._priced if plan.unique_bytes <= max_bytes]
        return min(within, key=lambda plan: (plan.price.kl, plan.unique_bytes))

    def _price(self, candidates: Sequence[Candidate]) -> None:
        """Prices what has not been priced yet."""
        known = [plan.rungs for plan in self._priced]
        fresh = [candidate for candidate in candidates if candidate.rungs not in known]
        prices = self._pricer.price([candidate.rungs for candidate in fresh])
        for candidate, price in zip(fresh, prices, strict=True):
            self._priced.append(self._plan(candidate.origin, candidate.rungs, price))

    def _plan(self, origin: str, rungs: Rungs, price: Price) -> PricedPlan:
        return PricedPlan(
            origin=origin, rungs=rungs, unique_bytes=self._unique_bytes(rungs), price=price
        )

    def _unique_bytes(self, rungs: Rungs) -> int:
        own_rows = count_own_rows(self._report, self._variant, rungs)
        return plan_bytes(rungs, own_rows, donor=self._donor, variant=self._variant).unique_bytes

    def _unchanged(self) -> Price:
        """Returns the price of a plan that changes no bit, which needs no measuring."""
        return Price(
            kl=0.0,
            kl_upper=0.0,
            top1=1.0,
            ppl_ratio=1.0,
            tokens=self._text.num_response_tokens,
            calibration=self._text.digest,
        )

    def _walk(self, text: CalibrationText, *, every: int = 1) -> Walk:
        lengths = [len(sequence.token_ids) for sequence in text.sequences[::every]]
        return Walk(self._variant.config, lengths, device=self._device, pace=self._pace)

    def _result(self, chosen: PricedPlan) -> TuneResult:
        self._meter.finish()
        return TuneResult(
            chosen=chosen,
            frontier=tuple(sorted(self._priced, key=lambda plan: plan.unique_bytes)),
            reference_tokens=self._text.num_response_tokens,
            calibration=self._text.digest,
            forward_passes=self._pricer.forward_passes,
            seconds=time.monotonic() - self._started,
        )


class _Meter:
    """Adds up bytes read against an estimate of all there will be."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        self.add(self._total)
