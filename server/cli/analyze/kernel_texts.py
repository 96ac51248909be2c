"""A user's texts, and kernels measured on them, for `linker analyze kernel`.

Rows of a file are taken in turns: one half may score weights, the other checks what came of it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from analysis.drawing import Drawing, Shape
from analysis.evaluation.dialogue_loss import dialogue_loss
from analysis.evaluation.token_loss import LEVEL, Change, TokenLoss
from analysis.family import StudiedFamily
from analysis.kernel.combination import Combination
from analysis.kernel.kernel import Kernel
from analysis.kernel.put import put_kernel
from analysis.model import StudyModel
from analysis.training_text import read_training_text
from linker_core.errors import InvalidRequestError
from linker_core.tuning.calibration import CalibrationSequence
from linker_core.weights.checkpoint import Checkpoint
from server.cli.analyze.kernel_found import Part
from server.cli.analyze.kernel_text_arguments import labelled
from server.cli.analyze.output import Cell, Shown
from server.cli.analyze.score_drawings import change_drawing
from server.cli.analyze.suite_arguments import chosen_device

BASE = "base"
_CONTEXT = 512


class Rows(NamedTuple):
    """A file's rows, as the base reads them."""

    scored: Sequence[CalibrationSequence]
    checked: Sequence[CalibrationSequence]


Texts = Mapping[str, Rows]
Losses = Mapping[str, Mapping[str, TokenLoss]]  # model -> text -> loss on the rows that check


def read_texts(args: argparse.Namespace, base: Checkpoint) -> Texts:
    """Returns the rows of every text.

    Raises:
        InvalidRequestError: Two of one label, a file that is of no use, fewer than two usable rows.
        BadCheckpointError: The base's tokenizer or template is damaged.
    """
    found: dict[str, Rows] = {}
    for label, file in labelled(args.texts, "texts").items():
        rows = read_training_text(
            base, Path(file), max_tokens=_CONTEXT, enough_tokens=2 * args.tokens
        )
        if len(rows) < 2:
            raise InvalidRequestError(
                f"--texts {label}: {file} has a single row that this model can read; give more.",
                param="texts",
            )
        found[label] = Rows(rows[::2], rows[1::2])
    return found


def base_model(args: argparse.Namespace, family: StudiedFamily) -> StudyModel:
    """Opens the base where --device says."""
    device, dtype = chosen_device(args)
    return StudyModel.open(family.base, device=device, dtype=dtype)


def measure(
    model: StudyModel, family: StudiedFamily, kernels: Mapping[str, Combination], texts: Texts
) -> Losses:
    """Returns the losses of the base, and of the base with each kernel; the model is the base's."""
    losses = {BASE: _measured(model, texts)}
    for label, kernel in kernels.items():
        put_kernel(model, family, kernel, scale=1.0)
        losses[label] = _measured(model, texts)
        model.restore(kernel.tensors)
    return losses


def companions(
    args: argparse.Namespace, family: StudiedFamily, kernel: Kernel, texts: Texts
) -> Part:
    """Returns a kernel's losses beside those of what it must be better than."""
    kernels = {
        "kernel": kernel,
        "uniform, its |K|": kernel.uniform(),
        "raw mean": kernel.raw_mean(),
    }
    losses = measure(base_model(args, family), family, kernels, texts)
    title = "Base + K on the texts"
    record = losses_to_json(losses)
    return Part("losses", record, [loss_table(title, losses)], [loss_drawing(title, losses)])


def losses_to_json(losses: Losses) -> dict[str, Any]:
    """Returns losses, and what they changed from the base, as JSON values."""
    return {
        model: {
            text: loss.to_json() | {"change": loss.change_from(losses[BASE][text]).to_json()}
            for text, loss in found.items()
        }
        for model, found in losses.items()
    }


def loss_table(title: str, losses: Losses) -> Shown:
    """Returns a row a model and a column a text."""
    texts = losses[BASE]
    rows: list[tuple[Cell, ...]] = [(BASE, *(f"{loss.mean:.3f}" for loss in texts.values()))]
    rows += [
        (model, *(_cell(loss, loss.change_from(texts[text])) for text, loss in found.items()))
        for model, found in losses.items()
        if model != BASE
    ]
    note = (
        f"Nats per token; in brackets the {LEVEL:.0%} interval of the change from the base, rows "
        "in pairs."
    )
    return Shown(title, ("model", *texts), rows, (note,))


def loss_drawing(title: str, losses: Losses) -> Drawing:
    """Returns what each kernel changes of each text's perplexity."""
    records = losses_to_json(losses)
    return change_drawing(
        {
            model: [found[text]["change"] for text in losses[BASE]]
            for model, found in records.items()
            if model != BASE
        },
        x=list(losses[BASE]),
        x_title="text",
        y_title="perplexity",
        shape=Shape.BARS,
        what=f"{title}: perplexity against the base's",
    )


def _measured(model: StudyModel, texts: Texts) -> dict[str, TokenLoss]:
    return {text: dialogue_loss(model, rows.checked) for text, rows in texts.items()}


def _cell(loss: TokenLoss, change: Change) -> str:
    if change.low is None or change.high is None:
        return f"{loss.mean:.3f}"
    return f"{loss.mean:.3f} [{_nats(change.low):+.2f}, {_nats(change.high):+.2f}]"


def _nats(percent: float) -> float:
    """Returns the change of a loss from that of its perplexity."""
    return math.log1p(percent / 100) if percent > -100 else -math.inf
