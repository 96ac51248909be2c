"""Cross-entropy on what the assistant says in dialogues, or on plain texts, one unit each.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from analysis.evaluation.token_loss import TokenLoss
from analysis.model import StudyModel
from analysis.training import in_batches
from linker_core.tuning.calibration import CalibrationSequence

_BATCH = 8


@torch.no_grad()
def dialogue_loss(model: StudyModel, texts: Sequence[CalibrationSequence]) -> TokenLoss:
    """Returns the nats of the tokens that are learnt, a unit for each text.

    Args:
        model: With the weights that it has now.
        texts: At least one, of `read_training_text`.
    """
    nats: list[float] = []
    counts: list[int] = []
    for batch in in_batches(texts, _BATCH):
        learnt_BT = batch.learnt_BT[:, 1:].to(model.device)
        losses_BT = model.losses(batch.ids_BT).double()
        nats += torch.where(learnt_BT, losses_BT, 0.0).sum(dim=1).tolist()
        counts += learnt_BT.sum(dim=1).tolist()
    return TokenLoss(nats=tuple(nats), num_tokens=tuple(counts))
