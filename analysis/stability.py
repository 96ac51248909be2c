"""FM §4.6: how much of PC1 hangs on one fine-tune, seen by leaving each out once.

Legend: N fine-tunes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from analysis.pca import direction_cosine, spectrum

CORE_COSINE = 0.95  # FM §4.6: leaving one of the core out keeps PC1's direction above it
MIN_CENTRED = 4  # centred PCA of the two that three would leave is 100 % by construction
MIN_UNCENTRED = 3


class Role(StrEnum):
    """What a fine-tune is to its family's shared direction (FM §4.6)."""

    CORE = "core"
    PERIPHERY = "periphery"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOneOut:
    """PC1 without each fine-tune in turn, against PC1 with all. None where PC1 does not exist."""

    cosines: tuple[float | None, ...]  # |cos| of the two directions
    pc1_shifts: tuple[float | None, ...]  # share without it, minus share with all


def leave_one_out(gram_NN: NDArray[np.float64], *, centred: bool) -> LeaveOneOut | None:
    """Returns the jackknife of PC1 over the fine-tunes (FM §4.6), of raw deltas.

    Fewer deltas share their variance between fewer components, so a share rises by leaving one out
    even where nothing is shared: of N unrelated equal deltas from 1/(N-1) to 1/(N-2), centred.

    Args:
        gram_NN: Inner products of the deltas.
        centred: Whether each PCA takes off the mean of the deltas that it sees.

    Returns:
        None with fewer than four fine-tunes, or three where nothing is centred.
    """
    num_models = len(gram_NN)
    if num_models < (MIN_CENTRED if centred else MIN_UNCENTRED):
        return None
    whole = spectrum(gram_NN, centred=centred, normalised=False)
    cosines: list[float | None] = []
    shifts: list[float | None] = []
    for dropped in range(num_models):
        kept = np.delete(np.arange(num_models), dropped)
        part = spectrum(gram_NN[np.ix_(kept, kept)], centred=centred, normalised=False)
        coefficients_N = np.zeros(num_models)
        coefficients_N[kept] = part.vectors_NN[:, 0]
        cosines.append(direction_cosine(gram_NN, whole.vectors_NN[:, 0], coefficients_N))
        shifts.append(None if part.pc1 is None or whole.pc1 is None else part.pc1 - whole.pc1)
    return LeaveOneOut(cosines=tuple(cosines), pc1_shifts=tuple(shifts))


def role_of(cosines: Sequence[float]) -> Role | None:
    """Returns FM's label of a fine-tune from its jackknife cosines over all tensors."""
    if not cosines:
        return None
    return Role.CORE if sum(cosines) / len(cosines) > CORE_COSINE else Role.PERIPHERY
