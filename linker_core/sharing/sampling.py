"""Which rows of a tensor are sampled, and what they say of the whole: estimates with bounds.

Stratified sampling: the rows of a matrix are cut into strata of neighbours and two are drawn from
each, so that every stratum shows how much its rows differ. Sums are scaled up; cos and ε are
functions of them, whose error is that of their linear part (Taylor). Rows whose energies differ by
orders of magnitude widen the bounds; rows unlike all that were drawn cannot be known of.

Legend: a is the donor's tensor, b the variant's, r a sampled row.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import NamedTuple

from linker_core.sharing.report import Bounds, Interval
from linker_core.sharing.similarity import PairSums

MIN_STRATA = 64  # with fewer, skewed rows make the bounds too narrow
_DRAWS = 2  # rows of each stratum
# Row energies are skewed, which Student's t knows nothing of: the bounds are drawn for this part of
# the risk that is stated.
_RISK_SHARE = 0.2
_MAX_FREEDOM = 400  # beyond it Student's t is the normal distribution, nearly


class Stratum(NamedTuple):
    """Neighbouring rows and those of them that are read."""

    num_rows: int
    rows: tuple[int, int]


class RowSums(NamedTuple):
    """The sums of one row, in the order in which a sweep finds them."""

    dot: float
    donor_square: float
    variant_square: float
    delta_square: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the sample of one tensor says: its sums, and each stratum's part of the variances."""

    sums: PairSums
    cos_variances: tuple[float, ...] = ()  # empty: it was read whole
    epsilon_variances: tuple[float, ...] = ()
    decides_nothing: bool = False
    """Some row that was read is unchanged, or zero: what is left may sit in rows that were not."""


def draw_strata(num_rows: int, fraction: float, rng: random.Random) -> list[Stratum] | None:
    """Returns the rows to read of a matrix, or None if it is as well read whole.

    Args:
        num_rows: Rows of the matrix.
        fraction: How many of them are wanted, within (0, 1]; small matrices get more.
        rng: Draws them.
    """
    num_strata = max(MIN_STRATA, math.ceil(fraction * num_rows / _DRAWS))
    if 2 * _DRAWS * num_strata > num_rows:
        return None
    edges = [index * num_rows // num_strata for index in range(num_strata + 1)]
    strata = []
    for begin, end in itertools.pairwise(edges):
        first, second = rng.sample(range(begin, end), _DRAWS)
        strata.append(Stratum(end - begin, (first, second)))
    return strata


def estimate(strata: Sequence[Stratum], rows: Sequence[RowSums], *, count: int) -> Estimate:
    """Returns what two rows of each stratum say of the whole tensor.

    Args:
        strata: As drawn.
        rows: The sums of their rows, in the same order.
        count: Elements of the whole tensor.
    """
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    scaled = [
        tuple(stratum.num_rows * (x + y) / _DRAWS for x, y in zip(*pair, strict=True))
        for stratum, pair in zip(strata, pairs, strict=True)
    ]
    dot, a, b, delta = map(math.fsum, zip(*scaled, strict=True))
    sums = PairSums(
        dot=dot,
        donor_square=a,
        variant_square=b,
        delta_square=delta,
        identical=False,  # bytes that were not read may differ
        count=count,
    )
    if not all(row.donor_square and row.variant_square and row.delta_square for row in rows):
        return Estimate(sums=sums, decides_nothing=True)

    def cos_part(row: RowSums) -> float:
        shrink = row.donor_square / (2 * a) + row.variant_square / (2 * b)
        return row.dot / (math.sqrt(a) * math.sqrt(b)) - sums.cos * shrink

    def epsilon_part(row: RowSums) -> float:
        return sums.epsilon / 2 * (row.delta_square / delta - row.donor_square / a)

    def variances(part: Iterable[tuple[float, float]]) -> tuple[float, ...]:
        return tuple(
            stratum.num_rows * (stratum.num_rows - _DRAWS) * (x - y) ** 2 / (2 * _DRAWS)
            for stratum, (x, y) in zip(strata, part, strict=True)
        )

    return Estimate(
        sums=sums,
        cos_variances=variances((cos_part(x), cos_part(y)) for x, y in pairs),
        epsilon_variances=variances((epsilon_part(x), epsilon_part(y)) for x, y in pairs),
    )


def mean_bounds(groups: Sequence[Sequence[Estimate]], *, level: float) -> Bounds:
    """Returns where the mean over groups of the means over their tensors lies.

    One group bounds a block (BS Eq. 1, 2); all blocks bound the means over a model.

    Args:
        groups: The estimates of each block's tensors.
        level: Of confidence, within (0, 1).
    """
    assert not any(part.decides_nothing for group in groups for part in group)
    cos = fmean(fmean(part.sums.cos for part in group) for group in groups)
    epsilon = fmean(fmean(part.sums.epsilon for part in group) for group in groups)
    weights = [1 / (len(groups) * len(group)) for group in groups]

    def spread(chosen: Iterator[tuple[float, tuple[float, ...]]]) -> float:
        return _half_width([w**2 * v for w, variances in chosen for v in variances], level)

    weighted = [(w, part) for w, group in zip(weights, groups, strict=True) for part in group]
    cos_half = spread((w, part.cos_variances) for w, part in weighted)
    epsilon_half = spread((w, part.epsilon_variances) for w, part in weighted)
    return Bounds(
        cos=Interval(max(-1.0, cos - cos_half), min(1.0, cos + cos_half)),
        epsilon=Interval(max(0.0, epsilon - epsilon_half), epsilon + epsilon_half),
    )


def student_quantile(level: float, freedom: int) -> float:
    """Returns t such that |T| ≤ t with probability `level` (Abramowitz and Stegun 26.7.3, 26.7.4).

    Args:
        level: Within (0, 1).
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _student_within(high, freedom) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < level else (low, middle)
    return high


_cached_quantile = lru_cache(maxsize=1024)(student_quantile)


def _half_width(variances: Sequence[float], level: float) -> float:
    total = math.fsum(variances)
    if total == 0.0:
        return 0.0
    # Satterthwaite: each stratum's variance has one degree of freedom; a few large ones leave few.
    freedom = total**2 / math.fsum(variance**2 for variance in variances)
    quantile = _cached_quantile(
        1 - (1 - level) * _RISK_SHARE, max(1, min(_MAX_FREEDOM, math.floor(freedom)))
    )
    return quantile * math.sqrt(total)


def _student_within(t: float, freedom: int) -> float:
    """Returns the probability of |T| ≤ t."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
