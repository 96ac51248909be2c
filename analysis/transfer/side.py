"""What a family gives to a transfer: its kernel, and the mean delta that others align with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Self

from analysis.deltas import DeltaOf
from analysis.family import StudiedFamily
from analysis.kernel.apply import kernel_delta
from analysis.kernel.kernel import Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One family's deltas by tensor; they are read when they are asked for."""

    kernel_of: DeltaOf  # FM Eq. 4: w_t · mean Δ
    mean_of: DeltaOf

    @classmethod
    def of(cls, family: StudiedFamily, kernel: Kernel) -> Self:
        """Returns the side of a family that stays open while the deltas are used."""
        return cls(
            kernel_of=partial(kernel_delta, family, kernel),
            mean_of=partial(kernel_delta, family, kernel.raw_mean()),
        )
