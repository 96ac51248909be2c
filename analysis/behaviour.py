"""How differently a fine-tune and its base continue a text: what weights alone do not say.

Legend: W tokens of a window, n positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from analysis.family import StudiedFamily
from analysis.model import StudyModel
from linker_core.weights.checkpoint import Checkpoint

WINDOW = 256


@torch.no_grad()
def kl_to_base(
    family: StudiedFamily, ids: Sequence[int], *, device: str = "cpu"
) -> dict[str, float]:
    """Returns each fine-tune's mean KL(fine-tune ‖ base) over next tokens, in nats per token.

    One model is in memory at a time, in float32, beside the base's logits of all tokens. Where
    vocabularies differ, both are compared on the tokens that they share. Infinite where a model's
    outputs are no numbers: it diverged, and behaves like nothing.

    Args:
        family: Open checkpoints.
        ids: A text in the base's tokens, at least one; read in windows of 256 tokens.
        device: Where the models run.

    Raises:
        LinkerError: As `StudyModel.open`.
    """
    windows = [list(ids[start : start + WINDOW]) for start in range(0, len(ids), WINDOW)]
    assert windows
    base = _logits(family.base, windows, device)
    return {
        name: _mean_kl(_logits(variant, windows, device), base)
        for name, variant in family.variants.items()
    }


def _logits(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], device: str
) -> list[torch.Tensor]:
    model = StudyModel.open(checkpoint, device=device)
    return [model.logits(model.hidden(torch.tensor([list(window)]))[0]).cpu() for window in windows]


def _mean_kl(ours: Sequence[torch.Tensor], base: Sequence[torch.Tensor]) -> float:
    total, num_tokens = 0.0, 0
    for our_nV, base_nV in zip(ours, base, strict=True):
        shared = min(our_nV.shape[1], base_nV.shape[1])
        our_log, base_log = (
            functional.log_softmax(logits[:, :shared], dim=-1) for logits in (our_nV, base_nV)
        )
        kl_n = functional.kl_div(base_log, our_log, reduction="none", log_target=True).sum(dim=-1)
        total += float(kl_n.double().sum())
        num_tokens += len(kl_n)
    mean = total / num_tokens
    return math.inf if math.isnan(mean) else max(0.0, mean)  # below 0 by rounding alone
