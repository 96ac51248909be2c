"""A step's sequences as the attention region reads them.

The arrays stay where they are from step to step, so that a recorded step can be replayed over the
sequences' new positions and pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from linker_core.engine.arithmetic import Span
from linker_core.engine.cpu.attention_spec import ITEM, ITEM_ROWS, SPAN
from linker_core.engine.kv_cache import KVCache


class PagedBatch:
    """Filled anew for each step.

    Attributes:
        cache: Whose pages the sequences have.
        records: Address and number of the spans, address and number of the items.
        num_seen: Positions that all rows see, together.
    """

    cache: KVCache

    def __init__(self) -> None:
        self._spans: npt.NDArray[np.int64] = np.empty((0, len(SPAN)), np.int64)
        self._items: npt.NDArray[np.int64] = np.empty((0, len(ITEM)), np.int64)
        self._pages: list[npt.NDArray[np.int32]] = []  # kept where the spans say
        self.records = (0, 0, 0, 0)
        self.num_seen = 0

    def fill(self, spans: Sequence[Span], cache: KVCache) -> bool:
        """Takes a step's spans, in the order of the rows.

        Returns:
            Whether the arrays are still where they were.
        """
        self.cache = cache
        self._pages = [span.table.pages for span in spans]
        firsts = np.cumsum([0, *(span.num_rows for span in spans)])[:-1]
        items = [
            (number, row)
            for number, span in enumerate(spans)
            for row in range(0, span.num_rows, ITEM_ROWS)
        ]
        stays = len(spans) <= len(self._spans) and len(items) <= len(self._items)
        if not stays:
            self._spans = np.empty((_room(len(spans)), len(SPAN)), np.int64)
            self._items = np.empty((_room(len(items)), len(ITEM)), np.int64)
        self._spans[: len(spans)] = [
            (first, span.num_rows, span.start, pages.ctypes.data)
            for first, span, pages in zip(firsts, spans, self._pages, strict=True)
        ]
        self._items[: len(items)] = items
        self.records = (
            *(self._spans.ctypes.data, len(spans)),
            *(self._items.ctypes.data, len(items)),
        )
        self.num_seen = sum(span.num_rows * (span.start + span.num_rows) for span in spans)
        return stays


def _room(count: int) -> int:
    return max(64, 1 << (count - 1).bit_length())
