"""The paged KV cache of one family: pages of token slots, shared by all its variants.

A page is `page_tokens` consecutive token slots. Pages of one sequence are kept consecutive where
possible, so that its history can be read as a view. Knows nothing of scheduling.

Legend: K key/value heads, S token slots, D head size, T rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What determines the size of a cache."""

    num_pages: int
    page_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        """Token slots in all."""
        return self.num_pages * self.page_tokens


@dataclass(slots=True, eq=False)
class PageTable:
    """The pages of one sequence, in the order of its tokens."""

    pages: list[int] = field(default_factory=list)
    contiguous: bool = True  # the pages are one run of consecutive numbers


class Run(NamedTuple):
    """A run of consecutive free pages."""

    first: int
    length: int


class KVCache:
    """Keys and values of every running sequence of a family.

    Memory is claimed untouched: on the CPU a page costs nothing until it is first written.
    """

    def __init__(self, shape: KVShape, *, device: torch.device) -> None:
        self.shape = shape
        size = (shape.num_layers, shape.num_kv_heads, shape.num_tokens, shape.head_dim)
        self.keys_LKSD = torch.empty(size, dtype=shape.dtype, device=device)
        self.values_LKSD = torch.empty(size, dtype=shape.dtype, device=device)
        self._free = np.ones(shape.num_pages, dtype=np.bool_)
        self._tables: set[PageTable] = set()

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return int(np.count_nonzero(self._free))

    @property
    def num_used_pages(self) -> int:
        """Pages that a sequence holds."""
        return self.shape.num_pages - self.num_free_pages

    def pages_for(self, num_tokens: int) -> int:
        """Returns how many pages `num_tokens` token slots take."""
        return -(-num_tokens // self.shape.page_tokens)

    def grow(self, table: PageTable, num_tokens: int) -> bool:
        """Gives `table` room for `num_tokens` tokens in all.

        Returns:
            False, with nothing changed, if there are not enough free pages.
        """
        missing = self.pages_for(num_tokens) - len(table.pages)
        if missing <= 0:
            return True
        if missing > self.num_free_pages:
            return False
        self._tables.add(table)
        while missing > 0:
            run = self._next_run(table, missing)
            self._free[run.first : run.first + run.length] = False
            if table.pages and run.first != table.pages[-1] + 1:
                table.contiguous = False
            table.pages.extend(range(run.first, run.first + run.length))
            missing -= run.length
        return True

    def release(self, table: PageTable) -> None:
        """Takes every page of `table` back."""
        if table in self._tables:
            self._tables.remove(table)
            self._free[table.pages] = True
        table.pages.clear()
        table.contiguous = True

    def check_integrity(self) -> None:
        """Asserts that no page is held twice and none is lost."""
        held = [page for table in self._tables for page in table.pages]
        assert len(held) == len(set(held)), "a page is held twice"
        assert len(held) == self.num_used_pages, "a page is lost"
        assert not self._free[held].any(), "a held page is free"
        for table in self._tables:
            consecutive = np.array_equal(np.diff(table.pages), np.ones(len(table.pages) - 1))
            assert table.contiguous == consecutive

    def _next_run(self, table: PageTable, wanted: int) -> Run:
        """Chooses up to `wanted` consecutive free pages, next to the sequence's last at best."""
        if table.pages:
            behind = self._run_from(table.pages[-1] + 1, wanted)
            if behind.length > 0:
                return behind
        largest = self._largest_run()
        first = largest.first
        if first > 0 and largest.length > wanted:
            # Leaves the sequence before this run room to grow.
            first += (largest.length - wanted) // 2
        return Run(first, min(wanted, largest.length))

    def _run_from(self, first: int, wanted: int) -> Run:
        held = np.flatnonzero(~self._free[first : first + wanted])
        available = min(wanted, self.shape.num_pages - first)
        return Run(first, int(held[0]) if held.size else max(available, 0))

    def _largest_run(self) -> Run:
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        firsts, ends = edges[::2], edges[1::2]
        best = int(np.argmax(ends - firsts))
        return Run(int(firsts[best]), int(ends[best] - firsts[best]))

    def token_slots(self, table: PageTable, first: int, end: int) -> np.ndarray:
        """Returns the token slots of positions `first` to `end - 1` of a sequence, int64."""
        positions = np.arange(first, end)
        page_tokens = self.shape.page_tokens
        pages = np.asarray(table.pages, dtype=np.int64)
        return pages[positions // page_tokens] * page_tokens + positions % page_tokens
