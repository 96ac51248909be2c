"""A step's sequences as the attention kernels read them, on the device.

The tensors stay where they are from step to step, so that a captured step can be replayed over the
sequences' new positions and pages.

Legend: T rows of the batch, J items, N pages of all sequences one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from linker_core.engine.arithmetic import Span
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.uploads import upload

ITEM_ROWS = 64  # most rows of an item
_FIRST_ROOM = 64


class StepTables:
    """Filled anew for each step.

    Attributes:
        cache: Whose pages the sequences have.
        items_J4: int32: an item's first row, its number of rows, the position of the first, and
            where its sequence's pages begin. Rows of an item belong to one sequence.
        pages_N: int32, with room behind the last.
        targets_T: int32, the token slot of the cache that each row's key and value go to.
        num_rows: Of the step.
        max_item_rows: Rows of the longest item; 1 if all sequences decode.
    """

    cache: KVCache
    items_J4: torch.Tensor
    pages_N: torch.Tensor
    targets_T: torch.Tensor

    def __init__(self) -> None:
        self._rooms: dict[str, torch.Tensor] = {}
        self._has_moved = False
        self.num_rows = self.max_item_rows = 0

    def fill(self, spans: Sequence[Span], cache: KVCache) -> bool:
        """Takes a step's spans, in the order of the rows.

        Returns:
            Whether the tensors are still where they were.
        """
        self.cache = cache
        self._has_moved = False
        items, targets = _items(spans), _targets(spans, cache.shape.page_tokens)
        self.num_rows = len(targets)
        self.max_item_rows = int(items[:, 1].max())
        self.items_J4 = self._on_device("items", items)[: len(items)]
        self.targets_T = self._on_device("targets", targets)[: len(targets)]
        self.pages_N = self._on_device("pages", np.concatenate([s.table.pages for s in spans]))
        return not self._has_moved

    def _on_device(self, name: str, numbers: npt.NDArray[np.int32]) -> torch.Tensor:
        device = self.cache.keys_LNKDP.device
        room = self._rooms.get(name)
        if room is None or len(room) < len(numbers):
            rows = max(_FIRST_ROOM, 1 << (len(numbers) - 1).bit_length())
            room = torch.zeros((rows, *numbers.shape[1:]), dtype=torch.int32, device=device)
            self._rooms[name] = room
            self._has_moved = True
        room[: len(numbers)].copy_(upload(numbers, device), non_blocking=True)
        return room


def _items(spans: Sequence[Span]) -> npt.NDArray[np.int32]:
    items: list[tuple[int, int, int, int]] = []
    first_row = first_page = 0
    for span in spans:
        for row in range(0, span.num_rows, ITEM_ROWS):
            num_rows = min(ITEM_ROWS, span.num_rows - row)
            items.append((first_row + row, num_rows, span.start + row, first_page))
        first_row += span.num_rows
        first_page += len(span.table)
    return np.array(items, np.int32)


def _targets(spans: Sequence[Span], page_tokens: int) -> npt.NDArray[np.int32]:
    parts = []
    for span in spans:
        positions = np.arange(span.start, span.start + span.num_rows, dtype=np.int32)
        parts.append(span.table.pages[positions // page_tokens] * page_tokens)
        parts[-1] += positions % page_tokens
    return np.concatenate(parts)
