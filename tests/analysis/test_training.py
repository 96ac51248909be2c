"""The loop itself: what is learnt, that it is learnt, and that twice is the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from analysis.model import StudyModel
from analysis.training import Recipe, as_batch, batches_of, fine_tune, held_out_loss
from linker_core.errors import InvalidRequestError
from linker_core.tuning.calibration import CalibrationSequence
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint


def text(*ids: int, learnt: range | None = None) -> CalibrationSequence:
    span = range(1, len(ids)) if learnt is None else learnt
    return CalibrationSequence(token_ids=ids, responses=(span,), kind="given", text_digest="")


TEXTS = (
    text(5, 9, 13, 17, 21, 25),
    text(6, 10, 14),
    text(7, 11, 15, 19, learnt=range(2, 4)),
)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[StudyModel]:
    with Checkpoint.open(make_checkpoint(tmp_path / "model", architecture="llama")) as checkpoint:
        yield StudyModel.open(checkpoint)


def test_as_batch_of_uneven_texts_marks_only_what_they_learn() -> None:
    batch = as_batch(TEXTS[1:])
    assert batch.ids_BT.tolist() == [[6, 10, 14, 0], [7, 11, 15, 19]]
    assert batch.learnt_BT.tolist() == [[False, True, True, False], [False, False, True, True]]


def test_batches_of_texts_use_each_once_a_round() -> None:
    six = list(islice(batches_of(TEXTS, batch=2, seed=3), 6))
    firsts = [int(row[0]) for batch in six for row in batch.ids_BT]
    assert [sorted(firsts[i : i + 3]) for i in range(0, 12, 3)] == [[5, 6, 7]] * 4


def test_held_out_loss_of_a_padded_batch_is_that_of_its_texts(model: StudyModel) -> None:
    together = held_out_loss(model, [as_batch(TEXTS)])
    apart = [held_out_loss(model, [as_batch([each])]) for each in TEXTS]
    assert together == pytest.approx((5 * apart[0] + 2 * apart[1] + 2 * apart[2]) / 9, rel=1e-5)


def test_fine_tune_learns_the_texts_it_sees(model: StudyModel) -> None:
    batches = [as_batch(TEXTS)]
    before = held_out_loss(model, batches)
    curve = fine_tune(
        model,
        batches_of(TEXTS, batch=3, seed=0),
        Recipe(steps=25, batch=3, rate=3e-3),
        measure=lambda: held_out_loss(model, batches),
        measure_every=10,
    )
    assert list(curve.measured) == [0, 10, 20, 25]
    assert curve.measured[0] == before
    assert curve.trained[0] == pytest.approx(before, rel=1e-5)
    assert curve.measured[25] < before / 2


def test_fine_tune_with_the_same_batches_gives_the_same_weights(model: StudyModel) -> None:
    recipe = Recipe(steps=3, batch=2)
    curves, ends = [], []
    for _ in range(2):
        model.restore()
        curves.append(fine_tune(model, batches_of(TEXTS, batch=2, seed=1), recipe))
        ends.append({name: model.get(name).clone() for name in model.names})
    assert curves[0] == curves[1]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in model.names)


def test_fine_tune_first_step_moves_a_weight_by_the_rate(model: StudyModel) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    before = model.get(name).clone()
    recipe = Recipe(steps=1, batch=3, rate=1e-3, warm_up=1)
    fine_tune(model, batches_of(TEXTS, batch=3, seed=0), recipe)
    moved = (model.get(name) - before).abs()
    # AdamW's first step is the rate times the sign of the gradient; the rate has half risen.
    assert float(moved.median()) == pytest.approx(5e-4, rel=1e-2)


def test_fine_tune_leaves_no_gradients_behind(model: StudyModel) -> None:
    fine_tune(model, batches_of(TEXTS, batch=2, seed=0), Recipe(steps=1, warm_up=0))
    assert not any(p.requires_grad for p in model.module.parameters())
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": 2.0}, {"warm_up": -1}]
)
def test_recipe_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        Recipe(**wrong)  # type: ignore[arg-type]
