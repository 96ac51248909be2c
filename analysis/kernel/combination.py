"""A family's deltas in fixed proportions, tensor by tensor: what kernels and their sums are.

Legend: N fine-tunes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedTensor:
    """One tensor's part: w Σ c_i Δ_i."""

    weight: float  # w
    coefficients: tuple[float, ...]  # c_i, in the order of the combination's names
    consensus_norm: float  # ‖Σ c_i Δ_i‖

    @property
    def norm(self) -> float:
        """‖w Σ c_i Δ_i‖."""
        return self.weight * self.consensus_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """A direction that can be put on the base; nothing is said of how it was found."""

    names: tuple[str, ...]  # of the fine-tunes
    tensors: Mapping[str, CombinedTensor]

    @property
    def norm(self) -> float:
        """‖K‖ over all tensors."""
        return math.hypot(*(tensor.norm for tensor in self.tensors.values()))


def combined_norm(gram_NN: NDArray[np.float64], c_N: NDArray[np.float64]) -> float:
    """Returns ‖Σ c_i Δ_i‖."""
    return math.sqrt(max(0.0, float(c_N @ gram_NN @ c_N)))
