"""Prices what another form makes of a variant: the rebuilt weights, written out as a checkpoint.

A pair whose "donor" is the rebuilt checkpoint has the plan that aliases everything, and that plan
is the rebuilt model, computed by the same kernels as a variant's own weights.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from linker_core.pace import Pace
from linker_core.sharing.price import Price
from linker_core.sharing.rungs import Rung
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.calibration import CalibrationText
from linker_core.tuning.pricing import Pricer
from linker_core.tuning.scoring import TaskScorer
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.tasks import Task
from linker_core.tuning.walk import Walk
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME, parse_key
from tests.benchmarks.rivals import Form
from tests.linker_core.engine.families import CPU

_DATA = "model.safetensors"


class Measured(NamedTuple):
    """What a form takes and costs."""

    bits_per_weight: float  # of all of the variant's weights, whatever is kept whole included
    price: Price
    accuracy: float  # mean over the tasks


class Judge:
    """Measures whole models against one variant, on one text and some tasks."""

    def __init__(self, variant: Checkpoint, text: CalibrationText, tasks: Sequence[Task]) -> None:
        self._variant = variant
        self._text = text
        self._tasks = tasks

    def measure(self, donor: Checkpoint, form: Form, *, embedding: bool) -> Measured:
        """Returns what a form makes of the variant.

        Args:
            donor: Whose weights the form may lean on.
            form: Of every matrix of the blocks.
            embedding: Whether embedding and head take the form too; else they are kept whole.
        """
        whole, bits_per_weight = rebuilt(donor, self._variant, form, embedding=embedding)
        with tempfile.TemporaryDirectory() as folder:
            for path in self._variant.path.iterdir():
                if path.name != _DATA:
                    shutil.copyfile(path, Path(folder) / path.name)
            save_file(whole, Path(folder) / _DATA, metadata={"format": "pt"})
            with Checkpoint.open(Path(folder)) as checkpoint:
                return Measured(bits_per_weight, *self._judged(checkpoint))

    def _judged(self, whole: Checkpoint) -> tuple[Price, float]:
        reader = SectionReader(
            whole,
            self._variant,
            identical=frozenset(),
            device=CPU,
            on_read=lambda _nbytes: None,
        )
        own = dict.fromkeys(self._variant.tensors, Rung.OWN)
        plan = dict.fromkeys(self._variant.tensors, Rung.ALIAS)
        lengths = [len(sequence.token_ids) for sequence in self._text.sequences]
        walk = Walk(self._variant.config, lengths, device=CPU, pace=Pace(), precision="highest")
        [price] = Pricer(walk, reader, own, self._text).price([plan])
        return price, accuracies(self._variant, reader, self._tasks, [plan])[0]


def rebuilt(
    donor: Checkpoint, variant: Checkpoint, form: Form, *, embedding: bool
) -> tuple[dict[str, torch.Tensor], float]:
    """Returns all tensors as they come out of a form, float32, and bits per weight of them all.

    Args:
        donor: Whose weights the form may lean on.
        variant: Whose norms and biases are kept as they are.
        form: Of every matrix of the blocks.
        embedding: Whether embedding and head take the form too; else they are kept whole.
    """
    lent, own = (load_file(each.path / _DATA) for each in (donor, variant))
    whole: dict[str, torch.Tensor] = {}
    num_bits = num_weights = 0
    for name, tensor in own.items():
        num_weights += tensor.numel()
        if is_matrix(name, tensor.shape, embedding=embedding):
            weight, bits = form(name, lent[name].float(), tensor.float())
        else:
            weight, bits = tensor.float(), 8 * tensor.nbytes
        whole[name] = weight.contiguous()
        num_bits += bits
    return whole, num_bits / num_weights


def accuracies(
    variant: Checkpoint,
    reader: SectionReader,
    tasks: Sequence[Task],
    plans: Sequence[Rungs],
) -> list[float]:
    """Returns each plan's mean score over the tasks."""
    scorer = TaskScorer(
        variant.config,
        Tokenizer.load(variant.path),
        reader,
        tasks,
        device=CPU,
        pace=Pace(),
        precision="highest",
    )
    scores = scorer.score(plans)
    return [sum(score.score for score in each.values()) / len(each) for each in scores]


def is_matrix(name: str, shape: Sequence[int], *, embedding: bool) -> bool:
    """Whether a tensor is a matrix of the blocks, or embedding or head if those count."""
    key = parse_key(name)
    assert key is not None
    outside = name in (EMBED_NAME, LM_HEAD_NAME)
    return len(shape) == 2 and (key.layer is not None or (embedding and outside))
