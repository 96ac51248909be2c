"""Kernels of a family that was trained on real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.family import StudiedFamily
from analysis.gram import TensorGram, gram_pass
from analysis.kernel.kernel import build_kernel
from analysis.kernel.metropolis import posterior_mean
from analysis.kernel.robust import STRATEGIES
from analysis.selection import select

pytestmark = pytest.mark.shared
NAMES = ("chat", "instruct", "math", "code")


@pytest.fixture(scope="module")
def grams(shared: Path) -> list[TensorGram]:
    root = shared / "families" / "mini-qwen2"
    with StudiedFamily.open(root / "base", {name: root / name for name in NAMES}) as family:
        return list(gram_pass(family, select(family.base)))


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02])
def test_weights_are_their_posterior_means_and_next_to_uniform(
    grams: list[TensorGram], temperature: float
) -> None:
    kernel = build_kernel(grams, names=NAMES, seed=0, temperature=temperature)
    scores = np.array([tensor.coherence.score for tensor in kernel.tensors.values()])
    weights = np.array([tensor.weight for tensor in kernel.tensors.values()])
    assert np.abs(weights - posterior_mean(scores / temperature)).max() < 0.02
    assert weights.min() > 0.5  # cosines are above 0
    cosine = kernel.cosine_to_uniform
    assert cosine is not None
    assert cosine > 0.999


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "mean"])
def test_continued_pretraining_weighs_least_in_every_robust_kernel(
    grams: list[TensorGram], name: str
) -> None:
    kernel = build_kernel(grams, names=NAMES, seed=0, strategy=STRATEGIES[name]())
    means = np.mean([tensor.coefficients for tensor in kernel.tensors.values()], axis=0)
    by_name = dict(zip(NAMES, means.tolist(), strict=True))
    assert min(by_name, key=lambda one: by_name[one]) == "code"
    assert by_name["code"] < 0.14
