"""Deltas on a model, and noise of their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.deltas import add_deltas, noise_like, shuffled
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint


def test_add_deltas_changes_the_named_tensors_alone(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with Checkpoint.open(make_checkpoint(tmp_path / "model")) as checkpoint:
        model = StudyModel.open(checkpoint)
        before = {each: model.get(each).clone() for each in model.names}
        for _ in range(2):
            norm = add_deltas(model, [name], lambda _: np.full((80, 48), 0.25, np.float32))
    assert norm == pytest.approx(0.25 * (80 * 48) ** 0.5)
    for each in model.names:
        assert torch.equal(model.get(each), before[each] + (0.5 if each == name else 0.0))


def test_add_deltas_refuses_what_leaves_the_models_range(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with Checkpoint.open(make_checkpoint(tmp_path / "model")) as checkpoint:
        model = StudyModel.open(checkpoint, dtype=torch.bfloat16)
        # Within float32's range, and rounded to an infinity in bfloat16.
        largest = np.finfo(np.float32).max
        with pytest.raises(InvalidRequestError, match=r"up_proj.*bfloat16.*--dtype float32"):
            add_deltas(model, [name], lambda _: np.full((80, 48), largest, np.float32))


def test_noise_like_a_delta_has_its_norm_and_another_direction() -> None:
    delta = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    noise = noise_like(delta, np.random.default_rng(1))
    assert noise.shape == delta.shape
    assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    cos = np.vdot(noise, delta) / np.linalg.norm(delta) ** 2
    assert abs(cos) < 5 / np.sqrt(delta.size)


def test_noise_like_nothing_is_nothing() -> None:
    assert not noise_like(np.zeros((2, 3), np.float32), np.random.default_rng(1)).any()


def test_shuffled_delta_has_its_values_and_spectrum_elsewhere() -> None:
    delta = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    moved = shuffled(delta, np.random.default_rng(1))
    assert sorted(moved.ravel()) == sorted(delta.ravel())
    before, after = (np.linalg.svd(each, compute_uv=False) for each in (delta, moved))
    np.testing.assert_allclose(after, before, rtol=1e-5)
    assert abs(np.corrcoef(moved.ravel(), delta.ravel())[0, 1]) < 0.2


def test_shuffled_delta_of_a_norm_or_a_bias_is_in_another_order() -> None:
    delta = np.arange(30, dtype=np.float32)
    moved = shuffled(delta, np.random.default_rng(1))
    assert not np.array_equal(moved, delta)
    np.testing.assert_array_equal(np.sort(moved), delta)
