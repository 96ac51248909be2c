"""Plain fine-tuning of a study's model, step by step, with its curve of losses.

Legend: B sequences, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import torch

from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.tuning.calibration import CalibrationSequence

MAX_STEPS: Final = 100_000
MAX_BATCH: Final = 1_024
_BETAS: Final = (0.9, 0.95)
_MAX_GRADIENT_NORM: Final = 1.0


class Batch(NamedTuple):
    """Sequences filled up on the right to the longest of them."""

    ids_BT: torch.Tensor  # int64
    learnt_BT: torch.Tensor  # bool: whether the token at this place is learnt; never the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is trained: AdamW without weight decay at a constant rate after a short rise.

    Raises:
        InvalidRequestError: A number is out of its range.
    """

    steps: int = 60
    batch: int = 8  # sequences of a step
    rate: float = 3e-4
    warm_up: int = 5  # steps over which the rate rises

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("steps", self.steps, 1, MAX_STEPS),
            ("batch", self.batch, 1, MAX_BATCH),
            ("warm_up", self.warm_up, 0, MAX_STEPS),
        ):
            if not low <= value <= high:
                raise InvalidRequestError(
                    f"{name} is {value}, expected {low} to {high}.", param=name
                )
        if not 0 < self.rate <= 1:
            raise InvalidRequestError(
                f"rate is {self.rate:g}, expected more than 0 and at most 1.", param="rate"
            )

    def rate_at(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        return self.rate * min(1.0, (step + 1) / (self.warm_up + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """Losses in nats per learnt token."""

    trained: tuple[float, ...]  # of each step's batch, before the step
    measured: Mapping[int, float] = field(default_factory=dict)  # steps done -> on other text


def batches_of(texts: Sequence[CalibrationSequence], *, batch: int, seed: int) -> Iterator[Batch]:
    """Yields batches for ever: every text once, in an order of its own each time round.

    Args:
        texts: At least one; `responses` are the tokens that are learnt.
        batch: Sequences of one; at the end of a round the next begins within the batch.
        seed: Of the orders.
    """
    order = _endless_order(len(texts), np.random.default_rng(seed))
    while True:
        yield as_batch([texts[i] for i in islice(order, batch)])


def as_batch(texts: Sequence[CalibrationSequence]) -> Batch:
    """Returns texts as one batch; what it is filled up with is never learnt."""
    longest = max(len(text.token_ids) for text in texts)
    ids_BT = torch.zeros(len(texts), longest, dtype=torch.int64)
    learnt_BT = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text.token_ids)] = torch.tensor(text.token_ids)
        for span in text.responses:
            learnt_BT[row, span.start : span.stop] = True
    return Batch(ids_BT, learnt_BT)


def in_batches(texts: Sequence[CalibrationSequence], batch: int) -> list[Batch]:
    """Returns all texts once, in their order."""
    return [as_batch(texts[i : i + batch]) for i in range(0, len(texts), batch)]


def fine_tune(
    model: StudyModel,
    batches: Iterator[Batch],
    recipe: Recipe,
    *,
    measure: Callable[[], float] | None = None,
    measure_every: int = 10,
) -> LossCurve:
    """Trains every weight of a model, in place. The same batches give the same weights.

    Args:
        model: Its weights are changed; `StudyModel.restore` brings them back.
        batches: One is drawn for each step.
        recipe: How.
        measure: Called before the first step, after every `measure_every` steps and after the
            last; what it returns becomes part of the curve.
        measure_every: Steps between two calls of it.
    """
    parameters = [model.module.get_parameter(name) for name in model.names]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=_BETAS, weight_decay=0.0)
    trained: list[float] = []
    measured: dict[int, float] = {}

    def look(step: int) -> None:
        if measure is not None and (step % measure_every == 0 or step == recipe.steps):
            measured[step] = measure()

    look(0)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        trained.append(_step(model, parameters, optimizer, next(batches)))
        look(step + 1)
    return LossCurve(trained=tuple(trained), measured=measured)


@torch.no_grad()
def held_out_loss(model: StudyModel, batches: Sequence[Batch]) -> float:
    """Returns the mean cross-entropy over all learnt tokens of all batches, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        learnt_BT = batch.learnt_BT[:, 1:].to(model.device)
        total += float(model.losses(batch.ids_BT)[learnt_BT].double().sum())
        count += int(learnt_BT.sum())
    return total / count


def _step(
    model: StudyModel,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> float:
    """Takes one step; gradients exist only meanwhile."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        loss = model.losses(batch.ids_BT)[batch.learnt_BT[:, 1:].to(model.device)].mean()
        gradients = torch.autograd.grad(loss, list(parameters))
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _endless_order(count: int, generator: np.random.Generator) -> Iterator[int]:
    while True:
        yield from generator.permutation(count).tolist()
