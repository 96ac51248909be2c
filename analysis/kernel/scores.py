"""How coherent the deltas of one tensor are: the factors of FM Eq. 3, from their Gram matrix alone.

Legend: N fine-tunes. Knows no file and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from analysis.pca import mean_cosine, signal_to_noise, spectrum

_FEWEST_CENTRED: Final = 3  # PC1 of two centred deltas is 1, whatever they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Coherence:
    """PC1, cos_sim and SNR of a tensor (FM Eq. 3)."""

    pc1: float  # share of variance, 0 to 1
    centred: bool  # whether the mean delta was taken off before PC1
    cos_mean: float  # over all pairs, -1 to 1; a zero delta's are 0
    snr: float  # ‖mean Δ‖ / rms‖Δi - mean Δ‖, 0 to `analysis.pca.MAX_SNR`

    @property
    def score(self) -> float:
        """Slope of FM Eq. 3 in w_t: PC1^t · cos_sim^t · SNR^t; negative where deltas oppose."""
        return self.pc1 * self.cos_mean * self.snr


def coherence(gram_NN: NDArray[np.float64], *, centred: bool = True) -> Coherence:
    """Returns what FM Eq. 3 multiplies, of one tensor.

    Deltas that are all zero have nothing in common: PC1, cosine and SNR are 0. Deltas that are all
    equal have everything in common: PC1 and cosine are 1, SNR is at its limit.

    Args:
        gram_NN: <Δi, Δj>, of two fine-tunes or more.
        centred: Whether PC1 is of the deltas less their mean, as PCA is commonly meant. Of two
            fine-tunes it is then 1 by construction, so it is taken uncentred, and the result says
            so.
    """
    assert len(gram_NN) >= 2
    centred = centred and len(gram_NN) >= _FEWEST_CENTRED
    if not gram_NN.any():
        return Coherence(pc1=0.0, centred=centred, cos_mean=0.0, snr=0.0)
    pc1 = spectrum(gram_NN, centred=centred, normalised=False).pc1
    return Coherence(
        pc1=1.0 if pc1 is None else pc1,
        centred=centred,
        cos_mean=mean_cosine(gram_NN),
        snr=signal_to_noise(gram_NN),
    )
