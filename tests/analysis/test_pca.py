"""PCA by the Gram matrix against the singular values of the whole stack."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.pca import (
    MAX_SNR,
    cosines,
    direction_cosine,
    mean_cosine,
    pc1_shares,
    signal_to_noise,
    spectrum,
)

Floats = NDArray[np.float64]
KINDS = [(False, False), (True, False), (False, True), (True, True)]


def stack(seed: int, num_models: int, num_elements: int = 500) -> Floats:
    """Deltas [N, D] with something in common, of sizes a thousandfold apart."""
    rng = np.random.default_rng(seed)
    shared_D = rng.standard_normal(num_elements)
    own_ND = rng.standard_normal((num_models, num_elements))
    sizes_N = 10.0 ** rng.uniform(-3.0, 0.0, num_models)
    deltas_ND: Floats = sizes_N[:, None] * (rng.uniform(-1, 2, (num_models, 1)) * shared_D + own_ND)
    return deltas_ND


def prepared(x_ND: Floats, *, centred: bool, normalised: bool) -> Floats:
    if normalised:
        x_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND - x_ND.mean(axis=0) if centred else x_ND


@pytest.mark.parametrize(("centred", "normalised"), KINDS)
@pytest.mark.parametrize("num_models", [2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(5))
def test_spectrum_of_random_deltas_is_that_of_the_full_decomposition(
    seed: int, num_models: int, *, centred: bool, normalised: bool
) -> None:
    x_ND = stack(seed, num_models)

    found = spectrum(x_ND @ x_ND.T, centred=centred, normalised=normalised)

    y_ND = prepared(x_ND, centred=centred, normalised=normalised)
    left_NN, singular_N, _ = np.linalg.svd(y_ND, full_matrices=False)
    shares_N = singular_N**2 / np.sum(singular_N**2)
    np.testing.assert_allclose(found.shares_N, shares_N, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.loadings, left_NN[:, 0] ** 2, rtol=0, atol=1e-8)
    assert found.total == pytest.approx(np.sum(y_ND**2), rel=1e-10)
    shares_N = shares_N[shares_N > 1e-30]
    assert found.effective_rank == pytest.approx(
        np.exp(-np.sum(shares_N * np.log(shares_N))), rel=1e-8
    )


@pytest.mark.parametrize(("centred", "normalised"), KINDS)
def test_pc1_shares_of_many_matrices_are_those_of_each(*, centred: bool, normalised: bool) -> None:
    stacks = [stack(seed, 4) for seed in range(6)]
    grams_BNN = np.array([x_ND @ x_ND.T for x_ND in stacks])

    shares_B = pc1_shares(grams_BNN, centred=centred, normalised=normalised)

    for share, gram_NN in zip(shares_B, grams_BNN, strict=True):
        one = spectrum(gram_NN, centred=centred, normalised=normalised)
        assert one.pc1 == pytest.approx(float(share), abs=1e-12)


@pytest.mark.parametrize("num_models", [3, 4, 7])
def test_spectrum_of_equal_cosines_has_the_share_known_by_hand(num_models: int) -> None:
    cosine = 0.18
    gram_NN = np.full((num_models, num_models), cosine)
    np.fill_diagonal(gram_NN, 1.0)

    raw = spectrum(gram_NN, centred=False, normalised=False)
    centred = spectrum(gram_NN, centred=True, normalised=False)

    assert raw.pc1 == pytest.approx((1 + (num_models - 1) * cosine) / num_models)
    assert centred.pc1 == pytest.approx(1 / (num_models - 1))  # what is common is the mean
    assert centred.effective_rank == pytest.approx(num_models - 1)


def test_spectrum_of_equal_deltas_centred_has_no_variance() -> None:
    x_D = np.random.default_rng(0).standard_normal(1000)
    gram_NN = np.full((3, 3), float(x_D @ x_D)) + 1e-13 * np.arange(9).reshape(3, 3)

    found = spectrum(gram_NN, centred=True, normalised=False)

    assert found.pc1 is None
    assert found.effective_rank == 0.0
    assert pc1_shares(gram_NN[None], centred=True, normalised=False)[0] == 0.0


@pytest.mark.parametrize(("centred", "normalised"), KINDS)
def test_spectrum_of_deltas_that_are_all_zero_has_no_variance(
    *, centred: bool, normalised: bool
) -> None:
    found = spectrum(np.zeros((3, 3)), centred=centred, normalised=normalised)

    assert found.pc1 is None
    assert found.shares_N.tolist() == [0.0, 0.0, 0.0]


def test_cosines_with_a_zero_delta_agree_with_none() -> None:
    gram_NN = np.array([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])

    assert cosines(gram_NN)[0].tolist() == [1.0, 0.5, 0.0]
    assert mean_cosine(gram_NN) == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("seed", range(4))
def test_signal_to_noise_is_that_of_the_deltas(seed: int) -> None:
    x_ND = stack(seed, 4)
    mean_D = x_ND.mean(axis=0)
    rms = np.sqrt(np.mean(np.sum((x_ND - mean_D) ** 2, axis=1)))

    assert signal_to_noise(x_ND @ x_ND.T) == pytest.approx(np.linalg.norm(mean_D) / rms)


def test_signal_to_noise_at_its_ends_is_finite() -> None:
    assert signal_to_noise(np.zeros((3, 3))) == 0.0
    assert signal_to_noise(np.ones((3, 3))) == MAX_SNR
    assert signal_to_noise(np.array([[1.0, -1.0], [-1.0, 1.0]])) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_direction_cosine_is_that_of_the_combined_deltas(seed: int) -> None:
    x_ND = stack(seed, 5)
    a_N, b_N = np.random.default_rng(seed).standard_normal((2, 5))
    a_D, b_D = a_N @ x_ND, b_N @ x_ND
    expected = abs(a_D @ b_D) / (np.linalg.norm(a_D) * np.linalg.norm(b_D))

    assert direction_cosine(x_ND @ x_ND.T, a_N, b_N) == pytest.approx(expected)
    assert direction_cosine(x_ND @ x_ND.T, a_N, np.zeros(5)) is None
