"""FM's tables 3 and 4: a kernel at several scales, measured, beside what it must be better than.

Every kernel has two companions: the same consensus with one weight for all tensors and equal norm
(what it gains over this, the weighting gains; the rest is the size's), and FM's raw mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from analysis.evaluation.suite import EncodedSuite, Scores
from analysis.evaluation.token_loss import finite
from analysis.family import StudiedFamily
from analysis.kernel.kernel import Kernel, Weighting
from analysis.kernel.put import put_kernel
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError

SCALES: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # FM table 4's, besides the baseline
MAX_SCALE: Final = 100.0
BASELINE: Final = "base"

Told = Callable[[str], None]


def unheard(_: str) -> None:
    """Stands for nobody who wants to hear how far a study is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One row of the tables."""

    label: str  # a weighting's value, a model's name, or BASELINE
    scale: float | None  # alpha of FM Eq. 5; None for a model as it is
    norm: float | None  # of what was added
    scores: Scores

    def to_json(self, baseline: Scores) -> dict[str, Any]:
        """Returns the scores and their changes from a baseline, as JSON values."""
        return {
            "label": self.label,
            "scale": self.scale,
            "norm": self.norm,
            "scores": self.scores.to_json(),
            "changes": changes(self.scores, baseline),
        }


def changes(scores: Scores, baseline: Scores) -> dict[str, Any]:
    """Returns what differs between two models that read the same tokens, metric by metric.

    Perplexities in percent with their interval; multiple choice in points with a standard error.
    JSON values, None for what is not finite: one of the models diverged.
    """
    found: dict[str, Any] = {
        f"wikitext_{protocol}": loss.change_from(baseline.text[protocol]).to_json()
        for protocol, loss in scores.text.items()
    }
    if scores.instruct and baseline.instruct:
        for part in ("record", "response"):
            loss, before = getattr(scores.instruct, part), getattr(baseline.instruct, part)
            found[f"instruct_{part}"] = loss.change_from(before).to_json()
    for name, score, asked in (
        ("mmlu", scores.mmlu_all, baseline.mmlu_all),
        ("tasks", scores.tasks_all, baseline.tasks_all),
    ):
        if score and asked:
            points, stderr = score.points_from(asked)
            found[name] = {"points": finite(points), "stderr": finite(stderr)}
    return found


def measure_base(model: StudyModel, suite: EncodedSuite, *, told: Told = unheard) -> Condition:
    """Returns the baseline: the base's model as it is."""
    told(BASELINE)
    return Condition(label=BASELINE, scale=0.0, norm=0.0, scores=suite.measure(model))


def sweep(
    model: StudyModel,
    family: StudiedFamily,
    kernel: Kernel,
    suite: EncodedSuite,
    *,
    scales: Sequence[float] = SCALES,
    weightings: Sequence[Weighting] = tuple(Weighting),
    told: Told = unheard,
) -> Iterator[Condition]:
    """Yields the scores of the base with every weighting's kernel at every scale.

    Args:
        model: The base's; it has the base's weights again at the end.
        family: The kernel's.
        kernel: With sampled weights.
        suite: In the base's tokens.
        scales: The alpha of each row.
        weightings: Which kernels.
        told: Hears what is measured next.
    """
    try:
        for weighting in weightings:
            weighted = companion(kernel, weighting)
            for scale in scales:
                told(f"{weighting.value} at {scale:g}")
                put_kernel(model, family, weighted, scale=scale)
                scores = suite.measure(model)
                norm = abs(scale) * weighted.norm
                yield Condition(label=weighting.value, scale=scale, norm=norm, scores=scores)
    finally:
        model.restore(kernel.tensors)


def measure_models(
    family: StudiedFamily,
    suite: EncodedSuite,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    told: Told = unheard,
) -> Iterator[Condition]:
    """Yields the scores of the fine-tunes as they are, all on the suite's tokens, one in memory.

    Raises:
        InvalidRequestError: A fine-tune's context is too short, before any is measured.
        LinkerError: As `StudyModel.open`.
    """
    for checkpoint in family.variants.values():
        suite.check_context(checkpoint)
    for name, checkpoint in family.variants.items():
        told(name)
        scores = suite.measure(StudyModel.open(checkpoint, device=device, dtype=dtype))
        yield Condition(label=name, scale=None, norm=None, scores=scores)


def companion(kernel: Kernel, weighting: Weighting) -> Kernel:
    """Returns a kernel of the same deltas with another weighting."""
    match weighting:
        case Weighting.SAMPLED:
            return kernel
        case Weighting.UNIFORM:
            return kernel.uniform()
        case Weighting.RAW_MEAN:
            return kernel.raw_mean()


def check_scales(scales: Sequence[float], *, option: str = "scales") -> None:
    """Refuses scales that are no numbers of a sensible size.

    Raises:
        InvalidRequestError: See above.
    """
    for scale in scales:
        if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
            raise InvalidRequestError(
                f"--{option} holds {scale}, expected numbers from -{MAX_SCALE:g} to {MAX_SCALE:g}.",
                param=option,
            )
