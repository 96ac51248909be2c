"""What fine-tunes agree on: strategies that weigh their deltas, from the Gram matrix alone.

FM Eq. 4 takes the mean. FM §6 names six ways to keep outlying fine-tunes from pulling it; each is
one class here and in `analysis.kernel.robust`. With two fine-tunes nothing tells which one
is the outlier, and every strategy is the mean.
Legend: N fine-tunes, c_N coefficients on their deltas, a_N those of a direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from analysis.pca import cosines, spectrum

FEWEST_FOR_OUTLIERS = 3
_ROUND_OFF = 1e-12  # two means of the same cosines in another order


class Strategy(Protocol):
    """Weighs deltas. Implementations are frozen dataclasses; their fields are their parameters."""

    name: ClassVar[str]

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns c_N: the consensus is Σ c_i Δ_i. They sum to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """FM Eq. 4: the arithmetic mean."""

    name: ClassVar[str] = "mean"

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        return equal(len(gram_NN))


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineGating:
    """FM §6 (a): fine-tunes whose mean cosine to the others is below a threshold are left out.

    FM gives no threshold. Without one it is `fraction` of the family's median mean cosine. Where
    that is not above 0, or no fine-tune reaches the threshold, all stay.
    """

    name: ClassVar[str] = "cosine_gating"
    threshold: float | None = None
    fraction: float = 0.5

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        num = len(gram_NN)
        if num < FEWEST_FOR_OUTLIERS:
            return equal(num)
        off_diagonal_NN = cosines(gram_NN) * (1 - np.eye(num))
        means_N = off_diagonal_NN.sum(axis=1) / (num - 1)
        threshold = self.threshold
        if threshold is None:
            threshold = self.fraction * float(np.median(means_N))
            if threshold <= 0:
                return equal(num)
        kept_N = means_N >= threshold
        return np.asarray(kept_N / kept_N.sum()) if kept_N.any() else equal(num)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimmedMean:
    """FM §6 (e): deltas ranked by their projection on PC1; the most extreme are dropped.

    Extreme is what lies farthest from the median projection, on either side. At least one fine-tune
    is dropped, also where none is an outlier: that is what trimming costs.
    """

    name: ClassVar[str] = "trimmed_mean"
    fraction: float = 0.2

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        num = len(gram_NN)
        if num < FEWEST_FOR_OUTLIERS:
            return equal(num)
        projections_N = gram_NN @ leading(gram_NN, centred=True)
        kept_N = ~_extremes(projections_N, self.fraction)
        return np.asarray(kept_N / kept_N.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class WinsorisedMean:
    """FM §6 (e): the most extreme projections on PC1 are pulled to the nearest that is kept.

    Only the part along PC1 is changed, so nothing of what the fine-tunes hold beside it is lost.
    With v = Σ a_i Δ_i, where the a_i sum to 0, the mean of the changed deltas is
    mean Δ + (mean change of projection) · v: coefficients that sum to 1 and may be negative.
    """

    name: ClassVar[str] = "winsorised_mean"
    fraction: float = 0.2

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        num = len(gram_NN)
        if num < FEWEST_FOR_OUTLIERS:
            return equal(num)
        a_N = leading(gram_NN, centred=True)
        projections_N = gram_NN @ a_N
        kept_N = projections_N[~_extremes(projections_N, self.fraction)]
        changes_N = np.clip(projections_N, kept_N.min(), kept_N.max()) - projections_N
        return np.asarray(equal(num) + changes_N.mean() * a_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchical:
    """FM §6 (f): fine-tunes are clustered, and the consensus is the mean of the clusters' means.

    Average linkage by cosine: clusters merge while the mean cosine between their members is at
    least `min_cosine`, which is the family's mean pairwise cosine unless it is given. Fine-tunes of
    one maker then count once.

    Of three fine-tunes the least alike is thus left out, unless all cosines are equal.
    Deviates from FM §6 (f): clusters of fewer than `min_size` members are left out if any is as
    large, because a lone outlier would otherwise weigh as much as all the others together.
    """

    name: ClassVar[str] = "hierarchical"
    min_cosine: float | None = None
    min_size: int = 2

    def coefficients(self, gram_NN: NDArray[np.float64]) -> NDArray[np.float64]:
        num = len(gram_NN)
        if num < FEWEST_FOR_OUTLIERS:
            return equal(num)
        cosines_NN = cosines(gram_NN)
        least = self.min_cosine
        if least is None:
            least = float(cosines_NN[np.triu_indices(num, k=1)].mean())
        clusters = _clusters(cosines_NN, least)
        clusters = [members for members in clusters if len(members) >= self.min_size] or clusters
        c_N = np.zeros(num)
        for members in clusters:
            c_N[members] = 1 / (len(clusters) * len(members))
        return c_N


def equal(num: int) -> NDArray[np.float64]:
    """Returns the coefficients of the mean."""
    return np.full(num, 1 / num)


def leading(gram_NN: NDArray[np.float64], *, centred: bool) -> NDArray[np.float64]:
    """Returns a_N: PC1 is the unit direction Σ a_i Δ_i; zeros where all deltas are the same.

    Centred, the a_i sum to 0. The sign is such that the deltas' projections sum to 0 or more.
    """
    found = spectrum(gram_NN, centred=centred, normalised=False)
    if found.total == 0:
        return np.zeros(len(gram_NN))
    a_N = found.vectors_NN[:, 0] / np.sqrt(found.total * found.shares_N[0])
    return np.asarray(-a_N if float((gram_NN @ a_N).sum()) < 0 else a_N)


def _extremes(values_N: NDArray[np.float64], fraction: float) -> NDArray[np.bool_]:
    """Returns which values lie farthest from the median: a fraction of all, at least one."""
    num = max(1, int(fraction * len(values_N)))
    distances_N = np.abs(values_N - np.median(values_N))
    extreme_N = np.zeros(len(values_N), dtype=np.bool_)
    extreme_N[np.argsort(distances_N, kind="stable")[-num:]] = True
    return extreme_N


def _clusters(cosines_NN: NDArray[np.float64], least: float) -> list[list[int]]:
    """Returns the members of each cluster, by average linkage."""
    clusters = [[i] for i in range(len(cosines_NN))]
    while len(clusters) > 1:
        likeness, i, j = max(
            (float(cosines_NN[np.ix_(clusters[i], clusters[j])].mean()), i, j)
            for i in range(len(clusters))
            for j in range(i)
        )
        if likeness < least - _ROUND_OFF:
            break
        clusters[j] += clusters.pop(i)
    return clusters
