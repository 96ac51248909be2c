"""BS appendix E on one pair: fit, sweep on PIQA and boundary rule, and how far they over-promise.

It is there to be compared with measured prices: each of its plans is also scored on held-out tasks
and priced. What it ends with can be given to policy `thresholds`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

import torch

from linker_core.errors import InvalidRequestError
from linker_core.pace import Pace
from linker_core.sharing.plan import plan_bytes
from linker_core.sharing.planner import identical_rungs
from linker_core.sharing.price import Price
from linker_core.sharing.report import ScanReport
from linker_core.sharing.rungs import Rung
from linker_core.sharing.thresholds import Thresholds, choose_thresholds
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.pricing import Pricer
from linker_core.tuning.recipe_result import (
    RecipePlan,
    RecipeResult,
    Step,
    SweepPoint,
    TaskInfo,
    TaskScore,
)
from linker_core.tuning.recipe_rules import (
    RecipeRequest,
    fitted_tau_frob,
    is_boundary,
    quality_slope,
    sweep_thresholds,
    widening_tau_cos,
    widest_that_holds,
)
from linker_core.tuning.scoring import TaskScorer
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.tasks import Task
from linker_core.tuning.texts import calibration_text
from linker_core.tuning.walk import Walk
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import block_name

_NUM_READS: Final = 3  # of both checkpoints: the sweep, the held-out tasks, the prices
_ROUNDING: Final = 1e-9  # of a retention: a budget may be met exactly

Progress = Callable[[int, int], None]  # bytes read, bytes to read
Scores = dict[str, TaskScore]  # by task


def paper_recipe(
    request: RecipeRequest, *, progress: Progress | None = None, pace: Pace | None = None
) -> RecipeResult:
    """Runs BS appendix E on a pair and measures what its plans keep and cost.

    Args:
        request: Which pair, which tasks, how much quality may be lost.
        progress: Called with bytes read and (about) all bytes to read.
        pace: Slows the work down while sequences run.

    Raises:
        BadCheckpointError: A checkpoint is damaged or changed.
        InvalidRequestError: A budget out of range, or tasks or a text that the variant cannot read.
    """
    request.check()
    with ExitStack() as stack:
        donor = stack.enter_context(Checkpoint.open(request.donor))
        variant = stack.enter_context(Checkpoint.open(request.variant))
        started = time.monotonic()
        measured = _Measured(request, donor, variant, progress=progress, pace=pace or Pace())
        return _Recipe(request, measured).run(started)


class _Recipe:
    """One run over plans that can be measured."""

    def __init__(self, request: RecipeRequest, measured: _Measured) -> None:
        self._report = request.report
        self._budget = request.quality_budget
        self._measured = measured
        self._sweep_task, self._heldout = request.tasks.sweep, request.tasks.heldout
        self._default = choose_thresholds(self._report, donor_fingerprint=request.donor_fingerprint)

    def run(self, started: float) -> RecipeResult:
        tau_cos = widening_tau_cos(self._default)
        fit = Thresholds(tau_cos=tau_cos, tau_frob=fitted_tau_frob(self._budget), source="fit")
        candidates = sweep_thresholds(self._report, tau_cos)
        own, swept = self._measured.scores([self._sweep_task], [self._default, fit, *candidates])
        points = self._points(own, candidates, swept[2:])
        found = points.index(widest_that_holds(points))
        steps: dict[Step, Thresholds] = {
            "default": self._default,
            "fit": fit,
            "sweep": candidates[found],
        }
        own_heldout, heldout = self._measured.scores(self._heldout, list(steps.values()))
        own = {**own, **own_heldout}
        on_sweep = [*swept[:2], swept[2 + found]]
        scores = [{**a, **b} for a, b in zip(on_sweep, heldout, strict=True)]
        plans = self._plans(steps, own, scores)
        return RecipeResult(
            quality_budget=self._budget,
            mean_epsilon=self._report.mean_epsilon,
            boundary=is_boundary(self._report),
            slope=quality_slope(),
            sweep_task=self._sweep_task.name,
            tasks={task.name: _info(task, own) for task in (self._sweep_task, *self._heldout)},
            sweep=tuple(points),
            plans=tuple(plans),
            chosen=plans[0] if is_boundary(self._report) else plans[2],
            seconds=time.monotonic() - started,
        )

    def _points(
        self, own: Scores, candidates: Sequence[Thresholds], scores: Sequence[Scores]
    ) -> list[SweepPoint]:
        name = self._sweep_task.name
        if own[name].score == 0.0:
            raise InvalidRequestError(
                f"Tasks: the variant has every question of {name} wrong, so a sweep on it tells "
                "nothing; ask more questions (limit).",
                param="tasks",
            )
        points = []
        for thresholds, by_task in zip(candidates, scores, strict=True):
            retention = by_task[name].score / own[name].score
            points.append(
                SweepPoint(
                    tau_frob=thresholds.tau_frob,
                    blocks_shared=_num_shared(self._report, thresholds),
                    score=by_task[name].score,
                    retention=retention,
                    holds=retention >= 1 - self._budget - _ROUNDING,
                )
            )
        return points

    def _plans(
        self, steps: Mapping[Step, Thresholds], own: Scores, scores: Sequence[Scores]
    ) -> list[RecipePlan]:
        prices = self._measured.prices(list(steps.values()))
        plans = []
        for (step, thresholds), by_task, price in zip(steps.items(), scores, prices, strict=True):
            kept = {
                name: score.score / own[name].score
                for name, score in by_task.items()
                if own[name].score > 0.0
            }
            plans.append(
                RecipePlan(
                    step=step,
                    thresholds=thresholds,
                    blocks_shared=_num_shared(self._report, thresholds),
                    unique_bytes=self._measured.unique_bytes(thresholds),
                    rungs=self._measured.rungs(thresholds),
                    scores=by_task,
                    promised=kept.pop(self._sweep_task.name),
                    heldout=kept,
                    price=price,
                )
            )
        return plans


class _Measured:
    """Scores, prices and sizes of the plans that thresholds make of a pair."""

    def __init__(
        self,
        request: RecipeRequest,
        donor: Checkpoint,
        variant: Checkpoint,
        *,
        progress: Progress | None,
        pace: Pace,
    ) -> None:
        self._report = request.report
        self._donor, self._variant = donor, variant
        self._device = torch.device(request.device)
        self._pace = pace
        self._precision = request.matmul_precision
        self._tokenizer = Tokenizer.load(variant.path)
        self._text = calibration_text(
            variant,
            request.calibration,
            device=request.device,
            pace=pace,
            precision=self._precision,
        )
        self._own = identical_rungs(self._report, donor, variant)
        self._reader = SectionReader(
            donor,
            variant,
            identical=frozenset(n for n, rung in self._own.items() if rung is Rung.ALIAS),
            device=self._device,
            on_read=_meter(_NUM_READS * (donor.nbytes + variant.nbytes), progress),
        )

    def scores(
        self, tasks: Sequence[Task], thresholds: Sequence[Thresholds]
    ) -> tuple[Scores, list[Scores]]:
        """Returns the unshared variant's scores, and those of each plan, from one walk."""
        scorer = TaskScorer(
            self._variant.config,
            self._tokenizer,
            self._reader,
            tasks,
            device=self._device,
            pace=self._pace,
            precision=self._precision,
        )
        own, *planned = scorer.score([self._own, *map(self.rungs, thresholds)])
        return own, planned

    def prices(self, thresholds: Sequence[Thresholds]) -> list[Price]:
        """Returns the prices of plans on the calibration text; equal ones are measured once."""
        plans = [self.rungs(one) for one in thresholds]
        distinct = [plan for i, plan in enumerate(plans) if plan not in plans[:i]]
        lengths = [len(sequence.token_ids) for sequence in self._text.sequences]
        walk = Walk(
            self._variant.config,
            lengths,
            device=self._device,
            pace=self._pace,
            precision=self._precision,
        )
        prices = Pricer(walk, self._reader, self._own, self._text).price(distinct)
        return [prices[distinct.index(plan)] for plan in plans]

    def rungs(self, thresholds: Thresholds) -> Rungs:
        """BS Eq. 3: all K sub-parameters of each shareable block, nothing outside the blocks."""
        aliased = {
            block_name(block.index, parameter)
            for block in self._report.blocks
            if thresholds.shares(block)
            for parameter in block.params
        }
        return {n: Rung.ALIAS if n in aliased else Rung.OWN for n in self._variant.tensors}

    def unique_bytes(self, thresholds: Thresholds) -> int:
        """Returns what the variant holds to itself."""
        rungs = self.rungs(thresholds)
        return plan_bytes(rungs, {}, donor=self._donor, variant=self._variant).unique_bytes


def _num_shared(report: ScanReport, thresholds: Thresholds) -> int:
    return sum(thresholds.shares(block) for block in report.blocks)


def _info(task: Task, own: Scores) -> TaskInfo:
    return TaskInfo(num_examples=len(task.examples), chance=task.chance, own=own[task.name])


def _meter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Returns a function that adds up bytes read against an estimate of all there will be."""
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)
        if progress is not None:
            progress(done, total)

    return add
