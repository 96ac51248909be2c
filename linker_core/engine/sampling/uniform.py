"""The random number of each token: a function of its sequence's seed and its place in the answer.

No state, so neither batch mates nor a preemption can change what a seed gives. The numbers of one
seed are SplitMix64's (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Sequence[int], places: Sequence[int]) -> npt.NDArray[np.float64]:
    """Returns one number of [0, 1) for each pair.

    Args:
        seeds: Of the sequences, below 2**64.
        places: How many tokens each has generated before.
    """
    # Scrambled first: the streams of neighbouring seeds then start far apart.
    state = _mix(np.array(seeds, dtype=np.uint64) + _GAMMA)
    words = _mix(state + _GAMMA * (np.array(places, dtype=np.uint64) + np.uint64(1)))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
