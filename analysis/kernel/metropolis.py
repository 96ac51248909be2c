"""The weights of FM Eq. 3 by Metropolis-Hastings, and what they are in closed form.

The score is a sum over tensors, so under exp(score / T) the weights of different tensors are
independent: there is a chain of its own for each, and all advance together.
Legend: T tensors, B batches. Knows neither deltas nor files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

NUM_STEPS: Final = 5000  # FM §5.7
BURN_IN: Final = 1000
TEMPERATURE: Final = 1.0  # FM states none; its mean weights, 0.503 and 0.509, are those of 1
_BATCHES: Final = 50  # of steps, for the standard error
_REACH: Final = 3.0  # how far a proposal goes at most, in widths of the target
_SERIES_BELOW: Final = 1e-3  # there 1 - exp(-s) loses digits; the series errs by s^5 / 30240


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What the chains of all tensors came to."""

    mean_T: NDArray[np.float64]  # of w after burn-in: the weights
    exact_T: NDArray[np.float64]  # the posterior means that they estimate
    standard_error_T: NDArray[np.float64]  # of mean_T, by batch means
    acceptance_T: NDArray[np.float64]  # share of proposals accepted after burn-in
    temperature: float
    num_steps: int
    burn_in: int
    seed: int

    @property
    def acceptance_ratio(self) -> float:
        """Over all tensors."""
        return float(self.acceptance_T.mean())


def sample_weights(
    scores_T: NDArray[np.float64],
    *,
    temperature: float = TEMPERATURE,
    num_steps: int = NUM_STEPS,
    burn_in: int = BURN_IN,
    seed: int,
) -> Chain:
    """Samples w in [0, 1]^T from exp(score(w) / T), score(w) = Σ_t w_t · scores_T[t] (FM Eq. 3).

    A proposal is uniform within a reach of w, folded back at 0 and 1, hence symmetric. The reach
    fits the target's width, 1 where the target is nearly flat; there a fold makes the proposal
    uniform over [0, 1].

    Args:
        scores_T: PC1 · cos_sim · SNR of each tensor; finite, may be negative.
        temperature: T, above 0.
        num_steps: After burn-in, at least as many as there are batches (50).
        burn_in: Steps that do not count.
        seed: Of the chains.
    """
    assert temperature > 0
    assert num_steps >= _BATCHES
    slopes_T = scores_T / temperature
    reach_T = np.minimum(1.0, _REACH / np.maximum(np.abs(slopes_T), _REACH))
    generator = np.random.default_rng(seed)
    w_T = np.where(slopes_T > 0, 1.0, 0.0)  # the mode: a narrow target is a long way from elsewhere
    sums_BT = np.zeros((_BATCHES, len(slopes_T)))
    accepted_T = np.zeros(len(slopes_T))
    for step in range(-burn_in, num_steps):
        proposed_T = w_T + reach_T * (2 * generator.random(len(w_T)) - 1)
        proposed_T = np.where(proposed_T < 0, -proposed_T, proposed_T)
        proposed_T = np.where(proposed_T > 1, 2 - proposed_T, proposed_T)
        gains_T = slopes_T * (proposed_T - w_T)
        taken_T = generator.random(len(w_T)) < np.exp(np.minimum(gains_T, 0))
        w_T = np.where(taken_T, proposed_T, w_T)
        if step >= 0:
            sums_BT[step * _BATCHES // num_steps] += w_T
            accepted_T += taken_T
    return Chain(
        mean_T=sums_BT.sum(axis=0) / num_steps,
        exact_T=posterior_mean(slopes_T),
        standard_error_T=_standard_error(sums_BT, num_steps),
        acceptance_T=accepted_T / num_steps,
        temperature=temperature,
        num_steps=num_steps,
        burn_in=burn_in,
        seed=seed,
    )


def posterior_mean(slopes_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns E[w] under a density ∝ exp(s·w) on [0, 1]: 1/(1 - e^(-s)) - 1/s.

    Near s = 0 by the series 1/2 + s/12 - s³/720.
    """
    small_T = np.abs(slopes_T) < _SERIES_BELOW
    s_T = np.where(small_T, 1.0, slopes_T)
    # For negative s by E[w](-s) = 1 - E[w](s): the exponential never overflows.
    positive_T = -1 / np.expm1(-np.abs(s_T)) - 1 / np.abs(s_T)
    closed_T = np.where(s_T > 0, positive_T, 1 - positive_T)
    return np.where(small_T, 0.5 + slopes_T / 12 - slopes_T**3 / 720, closed_T)


def _standard_error(sums_BT: NDArray[np.float64], num_steps: int) -> NDArray[np.float64]:
    """Returns the standard error of the mean, from batches that are longer than correlations."""
    edges = -(-np.arange(_BATCHES + 1) * num_steps // _BATCHES)
    means_BT = sums_BT / np.diff(edges)[:, None]
    return np.asarray(means_BT.std(axis=0, ddof=1) / _BATCHES**0.5)
