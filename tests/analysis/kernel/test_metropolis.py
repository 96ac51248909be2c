"""The chains against the closed form of what they estimate."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import quad

from analysis.kernel.metropolis import TEMPERATURE, posterior_mean, sample_weights

SLOPES = np.array([-1e6, -400.0, -30.0, -5.0, -1.0, -0.07, 0.0, 0.07, 1.0, 5.0, 30.0, 400.0, 1e6])


def _integrated(slope: float) -> float:
    """E[w] under exp(s·w) on [0, 1], by quadrature."""
    peak = max(slope, 0.0)
    moment = quad(lambda w: w * np.exp(slope * w - peak), 0, 1, epsabs=1e-13)[0]
    return float(moment / quad(lambda w: np.exp(slope * w - peak), 0, 1, epsabs=1e-13)[0])


@pytest.mark.parametrize("slope", [-30.0, -1.0, -1e-3, -1e-5, 0.0, 1e-9, 9.99e-4, 1e-3, 0.5, 30.0])
def test_posterior_mean_is_the_integral(slope: float) -> None:
    assert posterior_mean(np.array([slope]))[0] == pytest.approx(_integrated(slope), abs=1e-11)


def test_posterior_mean_of_opposite_slopes_adds_up_to_one() -> None:
    np.testing.assert_allclose(posterior_mean(SLOPES) + posterior_mean(-SLOPES), 1, atol=1e-12)


def test_posterior_mean_rises_with_the_slope() -> None:
    means = posterior_mean(np.linspace(-50, 50, 20_001))
    assert np.all(np.diff(means) > 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chains_estimate_the_posterior_mean(seed: int) -> None:
    chain = sample_weights(SLOPES, temperature=1.0, seed=seed)
    errors = (chain.mean_T - chain.exact_T) / chain.standard_error_T
    assert np.abs(errors).max() < 4.5
    # What a mean of 5,000 steps may err by: the target's deviation, at most 0.29, over sqrt(500).
    assert np.abs(chain.mean_T - posterior_mean(SLOPES)).max() < 0.29 * 500**-0.5


def test_standard_errors_are_as_large_as_the_errors() -> None:
    slopes = np.repeat(SLOPES, 200)
    chain = sample_weights(slopes, temperature=1.0, seed=3)
    errors: NDArray[np.float64] = (chain.mean_T - chain.exact_T) / chain.standard_error_T
    spread = errors.reshape(len(SLOPES), 200).std(axis=1)
    assert spread.min() > 0.8
    assert spread.max() < 1.4


def test_temperature_divides_the_scores() -> None:
    scores = np.array([0.1, -0.2, 0.4])
    cold = sample_weights(scores, temperature=0.05, seed=7)
    np.testing.assert_allclose(cold.exact_T, posterior_mean(scores * 20))
    np.testing.assert_array_equal(
        cold.mean_T, sample_weights(scores * 20, temperature=1.0, seed=7).mean_T
    )


def test_a_flat_target_accepts_everything_and_a_steep_one_does_not() -> None:
    chain = sample_weights(np.array([0.0, 50.0]), temperature=1.0, seed=0)
    assert chain.acceptance_T[0] == 1.0
    assert 0.2 < chain.acceptance_T[1] < 0.9
    assert chain.acceptance_ratio == pytest.approx(chain.acceptance_T.mean())


def test_the_same_seed_gives_the_same_chains_and_another_does_not() -> None:
    first, again, other = (
        sample_weights(SLOPES, temperature=1.0, num_steps=200, burn_in=10, seed=seed)
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.mean_T, again.mean_T)
    assert np.any(first.mean_T != other.mean_T)


def test_steps_that_do_not_fill_their_batches_evenly_are_all_counted() -> None:
    chain = sample_weights(np.array([1e6]), temperature=1.0, num_steps=73, burn_in=20, seed=0)
    assert chain.mean_T[0] == pytest.approx(1.0, abs=1e-5)
    assert 0 < chain.standard_error_T[0] < 1e-5


@pytest.mark.parametrize(
    ("pc1", "cos", "mean_weight"),
    [
        pytest.param(0.738, 0.182, 0.509, id="Mistral"),
        pytest.param(0.688, 0.129, 0.503, id="Llama"),
    ],
)
def test_the_default_temperature_gives_the_mean_weights_of_fm(
    pc1: float, cos: float, mean_weight: float
) -> None:
    # FM table 2 and appendix C; SNR of five deltas of equal norm at this cosine.
    snr = ((1 + 4 * cos) / (4 * (1 - cos))) ** 0.5
    found = posterior_mean(np.array([pc1 * cos * snr / TEMPERATURE]))
    assert found[0] == pytest.approx(mean_weight, abs=0.002)
