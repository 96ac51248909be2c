"""How long this machine takes to read weights from memory once, with all cores: decode's bound."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_WORDS_A_READ = 1 << 18  # of 64 bits


class MemoryReader:
    """Holds as many bytes as the weights have, in place, and reads them again and again."""

    def __init__(self, nbytes: int) -> None:
        words = np.arange(nbytes // 8, dtype=np.uint64)
        self.nbytes = words.nbytes
        self._cores = len(os.sched_getaffinity(0))
        # Each thread goes through a stretch of its own, as cores that stream weights do.
        self._stretches = np.array_split(words, self._cores)

    def seconds(self) -> float:
        """Returns how long one pass takes."""
        with ThreadPoolExecutor(self._cores) as pool:
            list(pool.map(_sum, self._stretches))  # starts the threads
            started = time.perf_counter()
            list(pool.map(_sum, self._stretches))
            return time.perf_counter() - started


def _sum(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> int:
    # In pieces, which leave the interpreter's lock alone for long and make no temporary.
    return sum(
        int(words[i : i + _WORDS_A_READ].sum()) & 1 for i in range(0, words.size, _WORDS_A_READ)
    )
