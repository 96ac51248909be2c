"""What a share or a cosine would be if the fine-tunes had nothing to do with each other.

A tensor's deltas are cut into C runs of elements, and each run of each fine-tune keeps or flips its
sign by a fair coin. **Exchangeable under the null**: for each fine-tune, the signs of its runs,
whatever the other fine-tunes do; so deltas that are independent of each other and symmetric run by
run pass the test exactly as often as its level says, whatever their sizes and tails. **Kept**: the
norm of every fine-tune, in every run, and all structure within a run; so a heavy fine-tune, which
raises PC1 by its weight alone, raises the null by as much. **Not covered**: one chance direction
that spans all runs of a tensor (it counts as found), and whether another choice of fine-tunes
would show the same (N is what it is; see `analysis.stability`). The coins give the
observed signs back once in 2^((C-1)(N-1)) draws, so what two fine-tunes share cannot stand in a
tensor of fewer than six runs, and what three share in one of fewer than four.

The bootstrap draws the C runs again with replacement: it says how far a share depends on which
elements were looked at, and nothing about which fine-tunes.

Legend: N fine-tunes, C runs, B draws, P pairs of fine-tunes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NORMAL_95 = 1.6448536269514722  # a normal variable stays below it 95 times in 100
MAX_PRODUCTS = 2**19  # signs held at once: 4 MiB, however many fine-tunes there are
ROUND_OFF = 1e-12  # two sums of the same runs in another order


class Interval(NamedTuple):
    """The bootstrap's, 95 %."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """An observed number against the null's draws."""

    observed: float
    null95: float  # the null stays at or below it 95 times in 100
    p_value: float  # one-sided, (1 + draws at least as large) / (1 + draws)


def generator(seed: int, name: str) -> np.random.Generator:
    """Returns the generator of one tensor: the same whichever tensors were studied before it."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def sign_flips(
    groups_CNN: NDArray[np.float64], *, num_draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Returns Gram matrices [B, N, N] under the null: Σ_c s_ic s_jc <Δi, Δj>_c, s = ±1."""
    num_runs, num_models = groups_CNN.shape[:2]
    rows, columns = np.triu_indices(num_models, k=1)
    products_CP = groups_CNN[:, rows, columns]
    grams_BNN = np.empty((num_draws, num_models, num_models))
    diagonal = np.arange(num_models)
    grams_BNN[:, diagonal, diagonal] = groups_CNN.sum(axis=0)[diagonal, diagonal]
    step = max(1, MAX_PRODUCTS // max(1, products_CP.size))
    for start in range(0, num_draws, step):
        count = min(step, num_draws - start)
        signs_bCN = rng.integers(0, 2, size=(count, num_runs, num_models), dtype=np.int8) * 2 - 1
        pairs_bCP = signs_bCN[:, :, rows] * signs_bCN[:, :, columns]
        sums_bP = np.einsum("bcp,cp->bp", pairs_bCP, products_CP)
        grams_BNN[start : start + count, rows, columns] = sums_bP
        grams_BNN[start : start + count, columns, rows] = sums_bP
    return grams_BNN


def resampled(
    groups_CNN: NDArray[np.float64], *, num_draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Returns the bootstrap's Gram matrices [B, N, N]: sums over C runs drawn with replacement."""
    num_runs, num_models = groups_CNN.shape[:2]
    counts_BC = rng.multinomial(num_runs, np.full(num_runs, 1.0 / num_runs), size=num_draws)
    sums: NDArray[np.float64] = counts_BC @ groups_CNN.reshape(num_runs, -1)
    return sums.reshape(num_draws, num_models, num_models)


def judge(observed: float, draws_B: NDArray[np.float64]) -> Verdict:
    """Returns what the null says about an observed number; large is what speaks against it."""
    at_least = int(np.count_nonzero(draws_B >= observed - ROUND_OFF))
    return Verdict(
        observed=observed,
        null95=float(np.quantile(draws_B, LEVEL)),
        p_value=(1 + at_least) / (1 + len(draws_B)),
    )


def interval(observed: float, draws_B: NDArray[np.float64]) -> Interval:
    """Returns the basic bootstrap's interval of a share: the draws' middle 95 %, mirrored at it.

    Where no axis stands out, the largest of several like eigenvalues is above the true share by
    chance, and the draws' are above that again: their own middle 95 % would hardly ever hold it.
    """
    quantiles = np.quantile(draws_B, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    low, high = np.clip(2.0 * observed - quantiles, 0.0, 1.0)
    return Interval(float(low), float(high))


def cosine_null95(groups_CNN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns what the null's cosine of each pair stays below 95 times in 100 [N, N], diagonal 0.

    The sum of C flipped products has the variance Σ_c <Δi, Δj>_c² and is taken as normal; of few
    runs that would reach beyond 1, where no cosine is.
    """
    squares_NN = np.sum(groups_CNN**2, axis=0)
    norms_N = np.sqrt(np.einsum("cii->i", groups_CNN))
    scales_NN = np.outer(norms_N, norms_N)
    bounds_NN: NDArray[np.float64] = np.zeros_like(squares_NN)
    np.divide(NORMAL_95 * np.sqrt(squares_NN), scales_NN, out=bounds_NN, where=scales_NN > 0.0)
    np.fill_diagonal(bounds_NN, 0.0)
    return np.minimum(bounds_NN, 1.0)


def discoveries(p_values: NDArray[np.float64], *, rate: float = 0.05) -> NDArray[np.bool_]:
    """Returns which of many tests stand at a false discovery rate (Benjamini and Hochberg).

    The signs are drawn anew for each tensor, so the tests of a study are independent under the null
    and the rate holds. A p-value is never below 1/(B+1): one tensor alone among hundreds cannot
    stand with too few draws.
    """
    num_tests = len(p_values)
    order = np.argsort(p_values, kind="stable")
    passes = p_values[order] <= rate * np.arange(1, num_tests + 1) / max(1, num_tests)
    stands = np.zeros(num_tests, dtype=bool)
    if passes.any():
        stands[order[: int(np.flatnonzero(passes)[-1]) + 1]] = True
    return stands
