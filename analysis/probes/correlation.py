"""Correlations that say nothing where there is nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

MIN_POINTS = 3  # two always lie on a line


class Correlation(NamedTuple):
    """A coefficient and the two-sided probability of one as large without any relation."""

    r: float
    p: float


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Returns Pearson's r; None for fewer than three points or one side without variation."""
    if _says_nothing(x, y):
        return None
    found = stats.pearsonr(x, y)
    return Correlation(float(found.statistic), float(found.pvalue))


def spearman(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Returns Spearman's rank correlation; None as `pearson`."""
    if _says_nothing(x, y):
        return None
    found = stats.spearmanr(x, y)
    return Correlation(float(found.statistic), float(found.pvalue))


def pearson_interval(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % interval of Pearson's r by Fisher's z; None below four points."""
    if _says_nothing(x, y) or len(x) <= MIN_POINTS:
        return None
    low, high = stats.pearsonr(x, y).confidence_interval(0.95)
    return float(low), float(high)


def _says_nothing(x: Sequence[float], y: Sequence[float]) -> bool:
    assert len(x) == len(y)
    return len(x) < MIN_POINTS or np.ptp(x) == 0.0 or np.ptp(y) == 0.0
