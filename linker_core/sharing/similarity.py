"""The sums of one pair of tensors, from which cosine, ε, finiteness and equality follow.

Legend: a is the donor's tensor, b the variant's, both as flat words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSums:
    """The sums of one pair of tensors. Any aggregation over K needs nothing else."""

    dot: float  # <a, b>
    donor_square: float  # |a|²
    variant_square: float  # |b|²
    delta_square: float  # |a - b|², summed directly, never expanded
    identical: bool  # same type and same bytes
    count: int  # elements of each

    @property
    def cos(self) -> float:
        """BS Eq. 1's summand. Both zero: 1; only one zero: 0 (BS leaves these undefined)."""
        if self.identical:
            return 1.0  # the square roots below would round it
        norms = math.sqrt(self.donor_square) * math.sqrt(self.variant_square)
        if norms == 0.0:
            return 1.0 if self.donor_square == self.variant_square else 0.0
        return max(-1.0, min(1.0, self.dot / norms))

    @property
    def epsilon(self) -> float:
        """BS Eq. 2's summand. Both zero: 0; only one zero: 1 (BS leaves these undefined)."""
        if self.donor_square == 0.0:
            return 0.0 if self.variant_square == 0.0 else 1.0
        return math.sqrt(self.delta_square) / math.sqrt(self.donor_square)
