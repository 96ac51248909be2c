"""Losses on dialogues, text by text."""

from __future__ import annotations

import pytest
import torch

from analysis.evaluation.dialogue_loss import dialogue_loss
from analysis.model import StudyModel
from linker_core.tuning.calibration import CalibrationSequence
from linker_core.weights.checkpoint import Checkpoint
from tests.analysis.planted import Planted


def _text(*ids: int, answers: tuple[range, ...]) -> CalibrationSequence:
    return CalibrationSequence(token_ids=ids, responses=answers, kind="given", text_digest="")


def test_only_answers_count_whatever_they_are_batched_with(small_family: Planted) -> None:
    texts = [
        _text(5, 9, 200, 31, 7, answers=(range(2, 4),)),
        _text(11, 12, answers=(range(1, 2),)),
        *(_text(*range(i, i + 9), answers=(range(1, 3), range(6, 9))) for i in range(3, 12)),
    ]
    with Checkpoint.open(small_family.base) as base:
        model = StudyModel.open(base)
        found = dialogue_loss(model, texts)
        assert found.num_tokens == (2, 1, *(5,) * 9)
        for text, nats in zip(texts, found.nats, strict=True):
            alone = model.losses(torch.tensor([text.token_ids]))[0]
            places = [place - 1 for span in text.responses for place in span]
            assert nats == pytest.approx(float(alone[places].sum()), rel=1e-5)
