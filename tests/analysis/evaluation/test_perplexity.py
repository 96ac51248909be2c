"""Both protocols against a plain computation, token by token."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from analysis.evaluation.perplexity import Protocol, full, sliding, text_loss
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint

IDS = torch.randint(3, 259, (83,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("perplexity") / "base")


def _nats(model: StudyModel, context: list[int], token: int) -> float:
    logits = model.logits(model.hidden(torch.tensor([context]))[0, -1:])
    return -float(logits.log_softmax(-1)[0, token])


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (20, 19), (200, 50), (2, 1)])
def test_sliding_windows_predict_every_token_but_the_first_once(window: int, stride: int) -> None:
    spans = list(sliding(256, window=window, stride=stride).spans(len(IDS)))
    scored = [token for span in spans for token in range(span.scored, span.stop)]
    assert scored == list(range(1, len(IDS)))
    assert all(span.stop - span.start <= window for span in spans)
    for span in spans[1:]:
        assert span.scored - span.start >= window - stride


@pytest.mark.parametrize("length", [10, 16, 83, 84, 82])
def test_full_sequences_predict_all_but_the_first_of_each(length: int) -> None:
    spans = list(full(256, length=length).spans(len(IDS)))
    assert [span.start for span in spans] == list(range(0, spans[-1].stop - 1, length))
    assert all(span.scored == span.start + 1 for span in spans)
    assert all(a.stop == b.start for a, b in pairwise(spans))


def test_the_sliding_loss_is_that_of_each_token_after_its_window(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        loss = text_loss(model, IDS[:30], sliding(256, window=12, stride=6))
        # Windows begin at 0, 6, 12, 18; each token is predicted by the first that reaches it.
        starts = {t: max(0, math.ceil((t + 1 - 12) / 6) * 6) for t in range(1, 30)}
        expected = [_nats(model, IDS[starts[t] : t], IDS[t]) for t in range(1, 30)]
    assert sum(loss.num_tokens) == 29
    assert loss.mean == pytest.approx(sum(expected) / 29, rel=1e-5)


def test_the_full_loss_is_that_of_each_token_after_its_sequence(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        loss = text_loss(model, IDS[:25], full(256, length=10))
        expected = [_nats(model, IDS[t - t % 10 : t], IDS[t]) for t in range(1, 25) if t % 10]
    assert loss.num_tokens == (9, 9, 4)
    assert loss.mean == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_windows_are_cut_to_the_context_and_overlap_by_half() -> None:
    assert sliding(256)[:] == (Protocol.SLIDING, 256, 128)
    assert full(256)[:] == (Protocol.FULL, 256, 256)


@pytest.mark.parametrize("stride", [0, -3, 256, 3000])
def test_windows_that_do_not_overlap_are_refused(stride: int) -> None:
    with pytest.raises(InvalidRequestError, match="stride"):
        sliding(256, stride=stride)


def test_each_protocol_says_what_it_is() -> None:
    assert sliding(64, stride=16).words == "windows of 64 tokens, stride 16"
    assert full(64).words == "full sequences of 64 tokens"
