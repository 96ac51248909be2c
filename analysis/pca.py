"""FM Eq. 2 on small Gram matrices: the PCA of N flattened deltas without the deltas.

The N deltas of a tensor are the rows of an N x D matrix X whose D is millions; X Xᵀ, the matrix of
their inner products, has the squared singular values of X as its eigenvalues, and its eigenvectors
are the coefficients that combine the deltas into principal directions. So PCA, directions and every
angle between directions follow from N x N numbers in float64, read once (`analysis.gram`).

Legend: N fine-tunes, B matrices at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOTHING = 1e-12  # a variance below this part of the deltas' energy is the float64 sums' round-off
MAX_SNR = 1e6  # deltas that agree better than this differ by that round-off alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """One PCA: how the variance of N deltas is shared between their principal components."""

    shares_N: NDArray[np.float64]  # explained variance, largest first, sum 1 (all 0: no variance)
    vectors_NN: NDArray[np.float64]  # column k: unit coefficients of component k over the deltas
    total: float  # what is shared: the sum of the squared (centred, normalised) deltas

    @property
    def pc1(self) -> float | None:
        """PC1's share of the variance; None where the deltas do not vary at all."""
        return float(self.shares_N[0]) if self.total > 0.0 else None

    @property
    def loadings(self) -> NDArray[np.float64]:
        """Squared loadings of PC1: which part of its variance each fine-tune brings, sum 1."""
        return self.vectors_NN[:, 0] ** 2

    @property
    def effective_rank(self) -> float:
        """The exponential of the shares' entropy: 1 for one direction, N for N equal ones."""
        if self.total == 0.0:
            return 0.0
        shares = self.shares_N[self.shares_N > 0.0]
        return math.exp(-float(np.sum(shares * np.log(shares))))


def spectrum(gram_NN: NDArray[np.float64], *, centred: bool, normalised: bool) -> Spectrum:
    """Returns the PCA of the deltas with this Gram matrix (FM Eq. 2).

    FM does not say whether it centres or scales, so the caller says both. Uncentred, the share of
    the deltas' energy along one direction through the base is measured; centred, the share of their
    variance around their mean, which is at least 1/(N-1) and with two deltas always 1.

    Args:
        gram_NN: Inner products of the deltas.
        centred: Whether the deltas' mean is taken off first.
        normalised: Whether each delta is first scaled to norm 1 (a zero delta stays zero).
    """
    inner_NN = inner(gram_NN, centred=centred, normalised=normalised)
    values_N, vectors_NN = np.linalg.eigh(inner_NN)
    values_N = np.clip(values_N[::-1], 0.0, None)
    total = float(values_N.sum())
    if total <= NOTHING * _energy(gram_NN, normalised=normalised):
        return Spectrum(
            shares_N=np.zeros_like(values_N), vectors_NN=np.zeros_like(vectors_NN), total=0.0
        )
    return Spectrum(shares_N=values_N / total, vectors_NN=vectors_NN[:, ::-1], total=total)


def pc1_shares(
    grams_BNN: NDArray[np.float64], *, centred: bool, normalised: bool
) -> NDArray[np.float64]:
    """Returns PC1's share of each of B Gram matrices [B]; 0 where there is no variance."""
    inner_BNN = inner(grams_BNN, centred=centred, normalised=normalised)
    largest_B = np.linalg.eigvalsh(inner_BNN)[:, -1]
    totals_B = np.trace(inner_BNN, axis1=1, axis2=2)
    least_B = NOTHING * np.asarray(_energy(grams_BNN, normalised=normalised))
    varies_B = totals_B > least_B
    shares_B = np.zeros_like(largest_B)
    np.divide(largest_B, totals_B, out=shares_B, where=varies_B)
    return shares_B


def inner(gram_NN: NDArray[np.float64], *, centred: bool, normalised: bool) -> NDArray[np.float64]:
    """Returns the inner products of the scaled and centred deltas, of one or of B matrices."""
    result_NN = gram_NN
    if normalised:
        result_NN = cosines(gram_NN)
    if centred:
        row_means = result_NN.mean(axis=-1, keepdims=True)
        column_means = result_NN.mean(axis=-2, keepdims=True)
        means = row_means.mean(axis=-2, keepdims=True)
        result_NN = result_NN - row_means - column_means + means
    return result_NN


def norms(gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the deltas' norms [..., N]."""
    return np.sqrt(np.diagonal(gram_NN, axis1=-2, axis2=-1))


def cosines(gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the cosines between deltas [..., N, N]; 0 where one is zero, its own included."""
    norms_N = norms(gram_NN)
    scales_N = np.zeros_like(norms_N)
    np.divide(1.0, norms_N, out=scales_N, where=norms_N > 0.0)
    return gram_NN * scales_N[..., :, None] * scales_N[..., None, :]


def mean_cosine(gram_NN: NDArray[np.float64]) -> float:
    """Returns the mean cosine over all pairs of different deltas; a zero delta agrees with none."""
    rows, columns = np.triu_indices(len(gram_NN), k=1)
    return float(cosines(gram_NN)[rows, columns].mean())


def signal_to_noise(gram_NN: NDArray[np.float64]) -> float:
    """Returns ‖mean Δ‖ / rms‖Δᵢ - mean Δ‖: 0 without a mean, at most `MAX_SNR`.

    FM names the ratio and does not define it; this is the common one. The mean square of the
    distances is mean‖Δᵢ‖² - ‖mean Δ‖².
    """
    signal = float(gram_NN.mean())
    noise = float(np.diag(gram_NN).mean()) - signal
    if signal <= 0.0:
        return 0.0
    if noise * MAX_SNR**2 <= signal:
        return MAX_SNR
    return math.sqrt(signal / noise)


def direction_cosine(
    gram_NN: NDArray[np.float64], a_N: NDArray[np.float64], b_N: NDArray[np.float64]
) -> float | None:
    """Returns |cos| between Σ aᵢΔᵢ and Σ bᵢΔᵢ; None where one of them vanishes.

    A principal direction has no sign of its own, so neither has the cosine.
    """
    norm_a, norm_b = (math.sqrt(max(0.0, float(x_N @ gram_NN @ x_N))) for x_N in (a_N, b_N))
    if norm_a == 0.0 or norm_b == 0.0:
        return None
    return min(1.0, abs(float(a_N @ gram_NN @ b_N)) / (norm_a * norm_b))


def _energy(gram_NN: NDArray[np.float64], *, normalised: bool) -> NDArray[np.float64] | float:
    """Returns the sum of the squared deltas before any centring, of one or of B matrices."""
    source_NN = cosines(gram_NN) if normalised else gram_NN
    return np.asarray(np.trace(source_NN, axis1=-2, axis2=-1))
