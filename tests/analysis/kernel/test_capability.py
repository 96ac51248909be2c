"""Chains with a measured score: against the closed form, where the score is linear."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.apply import kernel_delta
from analysis.kernel.capability import WeighedModel, capability_chain, layer_groups
from analysis.kernel.kernel import Kernel, build_kernel
from analysis.kernel.metropolis import posterior_mean
from analysis.model import StudyModel
from analysis.selection import select
from analysis.tensors import read_tensor
from tests.analysis.planted import Planted

K_PROJ, V_PROJ = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
GROUPS = {"k": (K_PROJ,), "v": (V_PROJ,)}
SLOPES = {K_PROJ: 4.0, V_PROJ: -2.0}


@pytest.fixture
def family(small_family: Planted) -> Iterator[StudiedFamily]:
    with small_family.open() as opened:
        yield opened


@pytest.fixture
def kernel(family: StudiedFamily) -> Kernel:
    return build_kernel(gram_pass(family, select(family.base)), names=family.names, seed=0)


class LinearScore:
    """Σ slope · w, the weights read off what the model holds."""

    def __init__(self, family: StudiedFamily, kernel: Kernel) -> None:
        self._base = {name: read_tensor(family.base, name) for name in SLOPES}
        self._consensus = {
            name: kernel_delta(family, kernel, name) / kernel.tensors[name].weight
            for name in SLOPES
        }

    def weights(self, model: StudyModel) -> dict[str, float]:
        return {
            name: float(
                np.vdot(model.get(name).numpy() - self._base[name], consensus)
                / np.vdot(consensus, consensus)
            )
            for name, consensus in self._consensus.items()
        }

    def __call__(self, model: StudyModel) -> float:
        return sum(SLOPES[name] * weight for name, weight in self.weights(model).items())


def test_a_linear_score_gives_the_posterior_mean(family: StudiedFamily, kernel: Kernel) -> None:
    score = LinearScore(family, kernel)
    weighed = WeighedModel(StudyModel.open(family.base), family, kernel, GROUPS)
    found = capability_chain(weighed, score, temperature=0.5, num_steps=3000, burn_in=100, seed=1)
    expected = posterior_mean(np.array([8.0, -4.0]))
    np.testing.assert_allclose(found.mean_G, expected, atol=0.04)
    assert 0.3 < found.acceptance_ratio < 0.9
    assert found.best_score == pytest.approx(found.scores_S.max(), abs=1e-6)
    assert found.best_G == pytest.approx([1, 0], abs=0.05)
    assert found.kernel.tensors[V_PROJ].weight == pytest.approx(found.mean_G[1])
    assert found.kernel.acceptance_ratio == pytest.approx(found.acceptance_ratio)
    assert (found.kernel.temperature, found.kernel.num_steps) == (0.5, 3000)


def test_the_model_always_holds_the_state_that_was_scored(
    family: StudiedFamily, kernel: Kernel
) -> None:
    score = LinearScore(family, kernel)
    model = StudyModel.open(family.base)
    seen: list[dict[str, float]] = []

    def watched(scored: StudyModel) -> float:
        seen.append(score.weights(scored))
        return score(scored)

    weighed = WeighedModel(model, family, kernel, GROUPS)
    start = weighed.weights_G
    capability_chain(weighed, watched, temperature=0.2, num_steps=30, burn_in=0, seed=0)
    assert list(seen[0].values()) == pytest.approx(start.tolist(), abs=1e-4)
    moved = [
        sum(abs(now[name] - then[name]) > 1e-5 for name in SLOPES)
        for then, now in itertools.pairwise(seen)
    ]
    assert max(moved) == 2  # one put back, another proposed
    assert all(-1e-5 < weight < 1 + 1e-5 for weights in seen for weight in weights.values())


def test_the_model_is_the_base_again(family: StudiedFamily, kernel: Kernel) -> None:
    model = StudyModel.open(family.base)
    before = {name: model.get(name).clone() for name in model.names}
    weighed = WeighedModel(model, family, kernel)

    def failing(_model: StudyModel) -> float:
        raise RuntimeError("measured nothing")

    with pytest.raises(RuntimeError, match="measured nothing"):
        capability_chain(weighed, failing, temperature=1, num_steps=1, burn_in=0, seed=0)
    assert all(torch.equal(model.get(name), before[name]) for name in model.names)


def test_a_score_that_is_no_number_is_left_as_soon_as_possible(
    family: StudiedFamily, kernel: Kernel
) -> None:
    linear = LinearScore(family, kernel)

    def broken_above(model: StudyModel) -> float:
        return float("nan") if linear.weights(model)[K_PROJ] > 0.3 else 0.0

    weighed = WeighedModel(StudyModel.open(family.base), family, kernel, GROUPS)
    found = capability_chain(
        weighed, broken_above, temperature=1, num_steps=200, burn_in=50, seed=0
    )
    assert np.isneginf(found.scores_S[0])
    assert found.mean_G[0] < 0.3
    assert found.best_score == 0


def test_the_same_seed_gives_the_same_chain(family: StudiedFamily, kernel: Kernel) -> None:
    score = LinearScore(family, kernel)
    weighed = WeighedModel(StudyModel.open(family.base), family, kernel, GROUPS)
    steps: list[tuple[int, int]] = []
    first, again, other = (
        capability_chain(
            weighed,
            score,
            temperature=0.5,
            num_steps=20,
            burn_in=5,
            seed=seed,
            told=lambda *step: steps.append(step),
        ).scores_S
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert steps[:25] == [(step, 25) for step in range(1, 26)]


def test_groups_are_the_layers_attention_and_mlp(kernel: Kernel) -> None:
    groups = layer_groups(kernel)
    assert set(groups) == {"0.attention", "0.mlp", "1.attention", "1.mlp"}
    assert [len(names) for names in groups.values()].count(4) == 2
    assert sorted(name for names in groups.values() for name in names) == sorted(kernel.tensors)
