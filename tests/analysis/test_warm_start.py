"""Starts compared in pairs: the arithmetic by hand, and a start that is known to help."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.model import StudyModel
from analysis.training import LossCurve, Recipe, as_batch, batches_of, fine_tune
from analysis.warm_start import (
    added,
    added_noise,
    compare_starts,
    compared,
    estimate,
    mean_height,
    steps_to,
)
from linker_core.weights.checkpoint import Checkpoint
from tests.analysis.test_training import TEXTS
from tests.tiny import make_checkpoint

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")


def curve(*losses: float, every: int = 10) -> LossCurve:
    return LossCurve(trained=(), measured={every * i: loss for i, loss in enumerate(losses)})


@pytest.fixture
def model(tmp_path: Path) -> Iterator[StudyModel]:
    with Checkpoint.open(make_checkpoint(tmp_path / "model", dtype="float32")) as checkpoint:
        yield StudyModel.open(checkpoint)


def test_mean_height_of_a_curve_is_its_area_over_its_length() -> None:
    assert mean_height(curve(4, 2, 1)) == pytest.approx((3 + 1.5) / 2)


@pytest.mark.parametrize(
    ("loss", "steps"), [(5.0, 0.0), (4.0, 0.0), (3.0, 5.0), (2.0, 10.0), (1.25, 17.5), (0.9, None)]
)
def test_steps_to_a_loss_are_interpolated(loss: float, steps: float | None) -> None:
    assert steps_to(curve(4, 2, 1), loss) == steps


def test_estimate_of_three_values_has_students_interval() -> None:
    # t(0.975, 2) = 4.302653; the standard deviation of 1, 2, 3 is 1.
    found = estimate([1.0, 2.0, 3.0])
    assert found == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)


def test_estimate_of_one_value_has_no_interval() -> None:
    assert estimate([1.5]) == (1.5, None, None)


def test_compared_start_below_the_base_gains_area_and_saves_steps() -> None:
    result = compared([curve(3, 2, 1), curve(3, 1, 1)], [curve(4, 3, 2), curve(4, 3, 2)])
    assert result.area_gain.mean == pytest.approx((1.0 + 1.5) / 2)
    assert result.last_gain.mean == pytest.approx(1)
    assert result.steps_to_base == (10.0, 5.0)
    assert result.saved_share is not None
    assert result.saved_share.mean == pytest.approx((0.5 + 0.75) / 2)


def test_compared_start_that_never_arrives_says_so() -> None:
    result = compared([curve(5, 4, 3)], [curve(4, 3, 2)])
    assert result.steps_to_base == (None,)
    assert result.saved_share is None
    assert result.area_gain.mean == -1


def test_compare_starts_at_the_base_itself_gives_the_bases_curves(model: StudyModel) -> None:
    nothing = added(NAMES, lambda name: np.zeros(model.get(name).shape, np.float32))
    results = compare_starts(
        model, {"nothing": nothing}, TEXTS, [as_batch(TEXTS)],
        Recipe(steps=4, batch=2), seeds=(0, 1), measure_every=2,
    )  # fmt: skip
    assert list(results) == ["base", "nothing"]
    assert results["nothing"].curves == results["base"].curves
    assert results["base"].curves[0] != results["base"].curves[1]
    assert results["nothing"].area_gain == (0, 0, 0)


def test_added_noise_is_not_the_draw_that_orders_the_rows(model: StudyModel) -> None:
    base = {name: model.get(name).clone() for name in NAMES}
    ones = {name: np.ones(values.shape, np.float32) for name, values in base.items()}
    start = added_noise(NAMES, ones.__getitem__)
    found = []
    for seed in (3, 3, 4):
        model.restore()
        start(model, seed)
        found.append({name: (model.get(name) - base[name]).numpy() for name in NAMES})
    rows = np.random.default_rng(3)  # as `batches_of` has it
    for name in NAMES:
        noise, again, other = (deltas[name] for deltas in found)
        np.testing.assert_array_equal(again, noise)
        size = np.sqrt(noise.size)  # the norm of every one of these deltas
        assert np.linalg.norm(noise) == pytest.approx(size, rel=1e-4)
        for unrelated in (other, rows.standard_normal(noise.shape)):
            cos = np.vdot(noise, unrelated) / (size * np.linalg.norm(unrelated))
            assert abs(cos) < 5 / size


def test_compare_starts_at_what_training_arrives_at_saves_steps(model: StudyModel) -> None:
    base = {name: model.get(name).clone() for name in model.names}
    recipe = Recipe(steps=12, batch=3, rate=3e-3)
    fine_tune(model, batches_of(TEXTS, batch=3, seed=7), recipe)
    tuned: dict[str, NDArray[np.float32]] = {
        name: (model.get(name) - base[name]).numpy() for name in model.names
    }
    starts = {
        "tuned": added(model.names, tuned.__getitem__),
        "noise": added_noise(model.names, tuned.__getitem__),
    }
    results = compare_starts(
        model, starts, TEXTS, [as_batch(TEXTS)], recipe, seeds=(0, 1), measure_every=3
    )
    low = results["tuned"].area_gain.low
    assert low is not None
    assert low > 0
    assert results["tuned"].steps_to_base[0] == 0
    assert results["noise"].area_gain.mean < results["tuned"].area_gain.mean
    assert all((model.get(name) == base[name]).all() for name in model.names)
