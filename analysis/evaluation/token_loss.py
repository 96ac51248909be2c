"""Cross-entropy over tokens that come in units, and how sure a mean of it is. Knows no model.

Tokens of one text are not independent of each other; units (windows of a text, whole records) are
nearly so. Standard errors are those of a ratio of sums over units, and two models are compared unit
by unit, where what makes a unit hard cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL: Final = 0.95  # of every interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How much a perplexity differs from a baseline's, in percent."""

    percent: float
    low: float | None  # of the interval at `LEVEL`; None with a single unit or without an end
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """Returns plain JSON values; None for what is not finite."""
        return {
            "percent": finite(self.percent),
            "low": finite(self.low),
            "high": finite(self.high),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """Nats summed over each unit, and the tokens that they are of."""

    nats: tuple[float, ...]
    num_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.nats) == len(self.num_tokens)
        assert sum(self.num_tokens) > 0

    @property
    def mean(self) -> float:
        """Nats per token: the mean cross-entropy."""
        return sum(self.nats) / sum(self.num_tokens)

    @property
    def perplexity(self) -> float:
        """Exp of the mean; infinite where the model diverged."""
        return _exp(self.mean)

    @property
    def stderr(self) -> float | None:
        """Standard error of `mean`; None with a single unit, or where the model diverged."""
        return _stderr(np.array(self.nats), self.num_tokens)

    def change_from(self, baseline: TokenLoss) -> Change:
        """Returns the change of perplexity from a model that read the same units."""
        assert self.num_tokens == baseline.num_tokens
        gained_U = np.array(self.nats) - np.array(baseline.nats)
        mean = self.mean - baseline.mean
        stderr = _stderr(gained_U, self.num_tokens)
        if stderr is None:
            return Change(percent=_percent(mean), low=None, high=None)
        reach = stderr * float(stats.t.ppf((1 + LEVEL) / 2, len(gained_U) - 1))
        return Change(
            percent=_percent(mean), low=_percent(mean - reach), high=_percent(mean + reach)
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; None for what is not finite."""
        return {
            "perplexity": finite(self.perplexity),
            "mean_nats": finite(self.mean),
            "stderr_nats": finite(self.stderr),
            "num_tokens": sum(self.num_tokens),
            "num_units": len(self.num_tokens),
        }


def finite(value: float | None) -> float | None:
    """Returns the value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def _stderr(nats_U: NDArray[np.float64], num_tokens: Sequence[int]) -> float | None:
    units = len(num_tokens)
    if units == 1 or not np.isfinite(nats_U).all():
        return None
    tokens_U = np.array(num_tokens)
    residuals_U = nats_U - nats_U.sum() / tokens_U.sum() * tokens_U
    variance = units / (units - 1) * float(residuals_U @ residuals_U) / float(tokens_U.sum()) ** 2
    return math.sqrt(variance)


def _percent(nats: float) -> float:
    return 100 * (_exp(nats) - 1)


def _exp(nats: float) -> float:
    """Returns exp, infinite where it is too large or the model's outputs were no numbers."""
    try:
        return math.inf if math.isnan(nats) else math.exp(nats)
    except OverflowError:
        return math.inf
