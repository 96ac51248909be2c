"""What BS's recipe found and how far its promise holds. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from linker_core.sharing.price import Price
from linker_core.sharing.rungs import AnyRung
from linker_core.sharing.thresholds import Thresholds

Step = Literal["default", "fit", "sweep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """How many of a task's questions a plan gets right."""

    acc: float  # lm-eval: the most likely choice
    acc_norm: float  # lm-eval: the most likely choice per character
    score: float  # the one of the two that is reported for the task
    stderr: float  # of the score, as of independent questions


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """What was asked, and what the unshared variant answers."""

    num_examples: int
    chance: float  # score of guessing
    own: TaskScore


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One τ_frob on the sweep's task."""

    tau_frob: float
    blocks_shared: int
    score: float
    retention: float  # score over the unshared variant's
    holds: bool  # the retention is at least 1 minus the quality budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipePlan:
    """One step's plan: what it promises on the sweep's task, what the others say, what it costs."""

    step: Step
    thresholds: Thresholds
    blocks_shared: int
    unique_bytes: int
    rungs: Mapping[str, AnyRung]
    scores: Mapping[str, TaskScore]  # by task
    promised: float  # retention on the sweep's task
    heldout: Mapping[str, float]  # retention on each other task; no task the variant has all wrong
    price: Price

    @property
    def heldout_mean(self) -> float | None:
        return fmean(self.heldout.values()) if self.heldout else None

    @property
    def heldout_worst(self) -> float | None:
        return min(self.heldout.values(), default=None)

    @property
    def over_promise_mean(self) -> float | None:
        """Points of retention promised beyond the mean of the held-out tasks."""
        return _points(self.promised, self.heldout_mean)

    @property
    def over_promise_worst(self) -> float | None:
        """Points of retention promised beyond the worst of the held-out tasks."""
        return _points(self.promised, self.heldout_worst)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values."""
        return {
            "step": self.step,
            **asdict(self.thresholds),
            "blocks_shared": self.blocks_shared,
            "unique_bytes": self.unique_bytes,
            "promised": self.promised,
            "heldout": dict(self.heldout),
            "heldout_mean": self.heldout_mean,
            "heldout_worst": self.heldout_worst,
            "over_promise_mean": self.over_promise_mean,
            "over_promise_worst": self.over_promise_worst,
            "scores": {name: asdict(score) for name, score in self.scores.items()},
            **self.price.to_json(),
            "rungs": {name: str(rung) for name, rung in self.rungs.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeResult:
    """Every step of the recipe on the same questions and the same text, and the choice."""

    quality_budget: float  # share of the score that may be lost
    mean_epsilon: float
    boundary: bool  # BS appendix E, step 3: the refinement is dropped, whatever it found
    slope: float  # quality lost per unit of ε, of the fit
    sweep_task: str
    tasks: Mapping[str, TaskInfo]
    sweep: tuple[SweepPoint, ...]  # by τ_frob
    plans: tuple[RecipePlan, ...]  # default, fit, sweep
    chosen: RecipePlan
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain JSON values."""
        return {
            "quality_budget": self.quality_budget,
            "mean_epsilon": self.mean_epsilon,
            "boundary": self.boundary,
            "slope": self.slope,
            "sweep_task": self.sweep_task,
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "sweep": [asdict(point) for point in self.sweep],
            "plans": [plan.to_json() for plan in self.plans],
            "chosen": self.chosen.to_json(),
            "seconds": self.seconds,
        }


def _points(promised: float, kept: float | None) -> float | None:
    return None if kept is None else 100 * (promised - kept)
