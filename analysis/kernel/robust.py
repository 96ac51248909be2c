"""Strategies that find their coefficients by iterating: FM §6 (b), (c) and (d).

Legend: N fine-tunes, c_N coefficients on their deltas, a_N those of a direction, d_N distances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from analysis.kernel.consensus import (
    FEWEST_FOR_OUTLIERS,
    CosineGating,
    Hierarchical,
    Mean,
    Strategy,
    TrimmedMean,
    WinsorisedMean,
    equal,
    leading,
)
from analysis.stability import leave_one_out

# Distances come from differences of sums: below this share of the largest norm they are round-off.
_ROUND_OFF: Final = 1e-7
_MAX_ITERATIONS: Final = 1000
_SETTLED: Final = 1e-10  # change of a coefficient


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricMedian:
    """FM §6 (b): the point with the least sum of distances to the deltas.

    Weiszfeld's iteration, with Vardi and Zhang's (2000) step where it meets a delta, at which the
    plain one stands still. The median is Σ c_i Δ_i with c_i ∝ 1/d_i, so it needs no parameter.
    """

    name: ClassVar[str] = "geometric_median"

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        return _settled(gram_NN, _weiszfeld_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReweightedPca:
    """FM §6 (c): PCA again and again, with less weight on deltas far from the axis it found.

    FM names the idea only. Here the axis is PC1 of the weighted deltas at unit length, uncentred,
    so that a large delta cannot claim it by its size. A delta's residual is what the axis leaves of
    it, all of it where it points the other way; its weight is 1/(1 + (residual/median residual)²),
    Cauchy's. Iterated until the weights stand still.
    """

    name: ClassVar[str] = "reweighted_pca"

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        return _settled(gram_NN, _cauchy_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOneOut:
    """FM §6 (d): a fine-tune weighs the less, the more PC1 turns when it is left out.

    c_i ∝ 1/(floor + 1 - |cos(PC1, PC1 without i)|), PC1 centred as in FM §4.6. FM says "inversely";
    the floor keeps a fine-tune whose removal changes nothing from taking everything. One without
    which the others do not differ at all turns PC1 entirely. Fewer than four fine-tunes leave no
    PC1 to compare with: then it is the mean.
    """

    name: ClassVar[str] = "leave_one_out"
    floor: float = 0.05

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        left = leave_one_out(gram_NN, centred=True)
        if left is None:
            return equal(len(gram_NN))
        turns_N = np.array([1.0 if cosine is None else 1 - cosine for cosine in left.cosines])
        c_N = 1 / (self.floor + turns_N)
        return np.asarray(c_N / c_N.sum())


STRATEGIES: Final[Mapping[str, type[Strategy]]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Mean,
            CosineGating,
            GeometricMedian,
            ReweightedPca,
            LeaveOneOut,
            TrimmedMean,
            WinsorisedMean,
            Hierarchical,
        )
    }
)


def _settled(
    gram_NN: NDArray[np.float64],
    step: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Returns where steps from the mean come to rest; the mean of too few to have an outlier."""
    c_N = equal(len(gram_NN))
    if len(gram_NN) < FEWEST_FOR_OUTLIERS:
        return c_N
    for _ in range(_MAX_ITERATIONS):
        next_N = step(gram_NN, c_N)
        change = float(np.abs(next_N - c_N).max())
        c_N = next_N
        if change < _SETTLED:
            break
    return c_N


def _weiszfeld_step(gram_NN: NDArray[np.float64], c_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the coefficients of the next point."""
    d_N = _distances(gram_NN, c_N)
    apart_N = d_N > _scale(gram_NN)
    inverse_N = np.divide(1.0, d_N, out=np.zeros_like(d_N), where=apart_N)
    if not apart_N.any():
        return c_N
    plain_N = inverse_N / inverse_N.sum()
    num_met = len(d_N) - int(apart_N.sum())
    if num_met == 0:
        return np.asarray(plain_N)
    # The pull of the others, Σ (Δi - x)/d_i, against that of the deltas that x has met, 1 each.
    pull_N = inverse_N - inverse_N.sum() * c_N
    pull = float(np.sqrt(max(0.0, float(pull_N @ gram_NN @ pull_N))))
    stay = min(1.0, num_met / pull) if pull > 0 else 1.0
    return np.asarray((1 - stay) * plain_N + stay * c_N)


def _distances(gram_NN: NDArray[np.float64], c_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ‖Δi - Σ c_j Δj‖."""
    squares_N = np.diag(gram_NN) - 2 * gram_NN @ c_N + c_N @ gram_NN @ c_N
    return np.asarray(np.sqrt(np.maximum(squares_N, 0)))


def _scale(gram_NN: NDArray[np.float64]) -> float:
    return _ROUND_OFF * float(np.sqrt(np.diag(gram_NN).max()))


def _residuals(gram_NN: NDArray[np.float64], c_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns what PC1 of the weighted unit deltas leaves of each delta."""
    norms_N = np.sqrt(np.diag(gram_NN))
    weights_N = np.divide(np.sqrt(c_N), norms_N, out=np.zeros_like(norms_N), where=norms_N > 0)
    a_N = weights_N * leading(gram_NN * np.outer(weights_N, weights_N), centred=False)
    along_N = np.maximum(gram_NN @ a_N, 0)
    return np.asarray(np.sqrt(np.maximum(norms_N**2 - along_N**2, 0)))


def _cauchy_step(gram_NN: NDArray[np.float64], c_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the weights that follow from the residuals of the weights before."""
    residuals_N = _residuals(gram_NN, c_N)
    scale = max(float(np.median(residuals_N)), _scale(gram_NN))
    if scale == 0:
        return equal(len(residuals_N))
    weights_N = 1 / (1 + (residuals_N / scale) ** 2)
    return np.asarray(weights_N / weights_N.sum())
