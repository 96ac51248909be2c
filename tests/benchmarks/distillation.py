"""BitDelta's second step: one scale for each matrix, by gradient descent on what the model says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import PreTrainedModel

from linker_core.tuning.calibration import CalibrationSequence, CalibrationText
from linker_core.weights.checkpoint import Checkpoint
from tests.benchmarks.rivals import signs
from tests.linker_core.engine.families import reference_model

_RATE = 0.02  # of Adam, on scales relative to the mean of |delta|
_BATCH = 4  # sequences of a step
_EPOCHS = 3

Tensors = Mapping[str, torch.Tensor]


def distilled_scales(
    donor: Checkpoint, variant: Checkpoint, matrices: list[str], text: CalibrationText
) -> Callable[[str, torch.Tensor], float]:
    """Returns the scales at which KL(variant ‖ planned) on the text's answers is least.

    BitDelta's objective is the squared error of the logits; KL is what is measured here.

    Args:
        donor: Of whose weights the signs are added.
        variant: The teacher.
        matrices: Which tensors are kept as signs; all others are the variant's.
        text: The calibration text.
    """
    lent = load_file(donor.path / "model.safetensors")
    own = load_file(variant.path / "model.safetensors")
    deltas = {name: own[name].float() - lent[name].float() for name in matrices}
    means = torch.stack([delta.abs().mean() for delta in deltas.values()])
    factors = torch.ones(len(matrices), requires_grad=True)
    optimizer = torch.optim.Adam([factors], lr=_RATE)
    teacher = reference_model(variant.path)
    for _ in range(_EPOCHS):
        for start in range(0, len(text.sequences), _BATCH):
            student = {
                name: lent[name].float() + scale * signs(deltas[name])
                for name, scale in zip(matrices, factors * means, strict=True)
            }
            losses = [
                _divergence(teacher, student, sequence)
                for sequence in text.sequences[start : start + _BATCH]
            ]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found = dict(zip(matrices, (factors.detach() * means).tolist(), strict=True))
    return lambda name, _delta: found[name]


def _divergence(
    model: PreTrainedModel, student: Tensors, sequence: CalibrationSequence
) -> torch.Tensor:
    """Returns the mean KL over a sequence's response tokens."""
    ids = torch.tensor([sequence.token_ids])
    rows = torch.tensor([p - 1 for span in sequence.responses for p in span])
    with torch.no_grad():
        taught = torch.log_softmax(model(ids, use_cache=False).logits[0, rows], dim=-1)
    logits = functional_call(model, dict(student), (ids,), {"use_cache": False}).logits[0, rows]
    learnt = torch.log_softmax(logits, dim=-1)
    return torch.nn.functional.kl_div(learnt, taught, log_target=True, reduction="batchmean")
