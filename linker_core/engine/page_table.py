"""The pages of one sequence, in the order of its tokens, as the attention kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_FIRST_ROOM = 8


class PageTable:
    """Page numbers of one sequence.

    Args:
        pages: What it begins with.

    Attributes:
        pages: [P] int32, C-contiguous; a view that the next change of the table replaces.
    """

    __slots__ = ("_buffer", "pages")

    def __init__(self, pages: Sequence[int] = ()) -> None:
        self._buffer: npt.NDArray[np.int32] = np.empty(max(_FIRST_ROOM, len(pages)), dtype=np.int32)
        self.pages = self._buffer[:0]
        self.extend(pages)

    def __len__(self) -> int:
        return len(self.pages)

    def extend(self, pages: Sequence[int]) -> None:
        """Appends pages behind the last."""
        start, end = len(self.pages), len(self.pages) + len(pages)
        if end > len(self._buffer):
            grown = np.empty(max(end, 2 * len(self._buffer)), dtype=np.int32)
            grown[:start] = self.pages
            self._buffer = grown
        self._buffer[start:end] = pages
        self.pages = self._buffer[:end]

    def clear(self) -> None:
        """Forgets every page."""
        self.pages = self._buffer[:0]
