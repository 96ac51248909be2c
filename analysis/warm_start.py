"""Fine-tuning that begins elsewhere than at the base: at base + kernel, or base + noise (FM §5.5).

Every start sees the same batches in the same order, seed by seed, so starts are compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.deltas import DeltaOf, add_deltas, noise_like
from analysis.model import StudyModel
from analysis.training import Batch, LossCurve, Recipe, batches_of, fine_tune, held_out_loss
from linker_core.tuning.calibration import CalibrationSequence

BASE: Final = "base"  # the start that all others are compared with
_LEVEL: Final = 0.95

# Changes a model that has the base's weights into where training begins; the seed is the run's.
Start = Callable[[StudyModel, int], None]


class Estimate(NamedTuple):
    """A mean over seeds and its 95 % interval (Student's t); no interval from a single seed."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartResult:
    """What fine-tuning from one start came to, over all seeds.

    Attributes:
        first: Held-out loss before training.
        last: Held-out loss after the last step.
        area: Mean held-out loss over the run: the area under the curve (trapezia) by its length.
        area_gain: The base's area less this one's, seed by seed; above 0 is better than the base.
        last_gain: The base's last loss less this one's, seed by seed.
        steps_to_base: Steps until the loss at which the base ends, by seed; None: never reached.
        saved_share: Share of the base's steps that are saved until there, over the seeds that
            reach it; None if none does.
        curves: By seed.
    """

    first: Estimate
    last: Estimate
    area: Estimate
    area_gain: Estimate
    last_gain: Estimate
    steps_to_base: tuple[float | None, ...]
    saved_share: Estimate | None
    curves: tuple[LossCurve, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; a curve's measured losses are pairs of steps and nats."""
        record: dict[str, Any] = {
            name: getattr(self, name)._asdict()
            for name in ("first", "last", "area", "area_gain", "last_gain")
        }
        return record | {
            "steps_to_base": list(self.steps_to_base),
            "saved_share": self.saved_share and self.saved_share._asdict(),
            "curves": [
                {"trained": list(curve.trained), "measured": sorted(curve.measured.items())}
                for curve in self.curves
            ],
        }


def added(names: Iterable[str], delta_of: DeltaOf) -> Start:
    """Returns the start base + delta."""
    chosen = tuple(names)

    def start(model: StudyModel, _seed: int) -> None:
        add_deltas(model, chosen, delta_of)

    return start


def added_noise(names: Iterable[str], delta_of: DeltaOf) -> Start:
    """Returns the start base + noise: normal deltas, each of its tensor's delta's norm."""
    chosen = tuple(names)

    def start(model: StudyModel, seed: int) -> None:
        # A stream of its own: the seed's first is the one that the order of the rows is drawn from.
        (stream,) = np.random.SeedSequence(seed).spawn(1)
        generator = np.random.default_rng(stream)
        add_deltas(model, chosen, lambda name: noise_like(delta_of(name), generator))

    return start


def compare_starts(
    model: StudyModel,
    starts: Mapping[str, Start],
    texts: Sequence[CalibrationSequence],
    held_out: Sequence[Batch],
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    measure_every: int = 5,
    on_run: Callable[[str, int, LossCurve], None] | None = None,
) -> dict[str, StartResult]:
    """Fine-tunes from the base and from every start, once for each seed.

    Args:
        model: Of the base; has its weights again afterwards.
        starts: Name -> start; the base's own is added.
        texts: What is trained on.
        held_out: What is measured on.
        recipe: Of every run.
        seeds: At least one; of the batches' order, and of a start's noise.
        measure_every: Steps between two measurements.
        on_run: Told the start, the seed and the curve after each run.

    Returns:
        By name, the base first.
    """
    assert BASE not in starts
    curves: dict[str, list[LossCurve]] = {BASE: [], **{name: [] for name in starts}}
    for seed in seeds:
        for name, found in curves.items():
            model.restore()
            if name != BASE:
                starts[name](model, seed)
            curve = fine_tune(
                model,
                batches_of(texts, batch=recipe.batch, seed=seed),
                recipe,
                measure=lambda: held_out_loss(model, held_out),
                measure_every=measure_every,
            )
            found.append(curve)
            if on_run is not None:
                on_run(name, seed, curve)
    model.restore()
    return {name: compared(found, curves[BASE]) for name, found in curves.items()}


def compared(curves: Sequence[LossCurve], base: Sequence[LossCurve]) -> StartResult:
    """Returns a start's result beside the base's curves of the same seeds."""
    ends = [max(curve.measured) for curve in base]
    goals = [curve.measured[end] for curve, end in zip(base, ends, strict=True)]
    steps = [steps_to(curve, goal) for curve, goal in zip(curves, goals, strict=True)]
    saved = [1 - step / end for step, end in zip(steps, ends, strict=True) if step is not None]
    lasts = [curve.measured[end] for curve, end in zip(curves, ends, strict=True)]
    areas, base_areas = [mean_height(c) for c in curves], [mean_height(c) for c in base]
    return StartResult(
        first=estimate([curve.measured[0] for curve in curves]),
        last=estimate(lasts),
        area=estimate(areas),
        area_gain=estimate(np.subtract(base_areas, areas)),
        last_gain=estimate(np.subtract(goals, lasts)),
        steps_to_base=tuple(steps),
        saved_share=estimate(saved) if saved else None,
        curves=tuple(curves),
    )


def mean_height(curve: LossCurve) -> float:
    """Returns the area under the measured losses, over their steps."""
    steps, losses = _points(curve)
    return float(np.trapezoid(losses, steps) / (steps[-1] - steps[0]))


def steps_to(curve: LossCurve, loss: float) -> float | None:
    """Returns when the measured loss first is as low, interpolated between measurements."""
    steps, losses = _points(curve)
    low = np.flatnonzero(losses <= loss)
    if not len(low):
        return None
    first = int(low[0])
    if first == 0:
        return float(steps[0])
    share = (losses[first - 1] - loss) / (losses[first - 1] - losses[first])
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1]))


def estimate(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Returns the mean of independent values with Student's interval; at least one value."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, None, None)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * error
    return Estimate(mean, mean - half, mean + half)


def _points(curve: LossCurve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps = sorted(curve.measured)
    return np.array(steps, float), np.array([curve.measured[step] for step in steps])
