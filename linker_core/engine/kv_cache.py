"""The paged KV cache of one family: pages of token slots, shared by all its variants.

A page is `page_tokens` consecutive token slots; the pages of a sequence lie anywhere. Full pages
whose content is known to be good can be held by several sequences. Knows nothing of scheduling.

Legend: L layers, N pages, K key/value heads, P token slots of a page, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linker_core.engine.page_pool import PagePool
from linker_core.engine.page_table import PageTable


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


class KVCache:
    """Keys and values of every sequence of a family, and of those that may come again.

    Memory is claimed untouched: on the CPU a page costs nothing until it is first written.
    """

    def __init__(self, shape: KVShape, *, device: torch.device) -> None:
        self.shape = shape
        pages, heads = (shape.num_layers, shape.num_pages), shape.num_kv_heads
        tokens, head_dim = shape.page_tokens, shape.head_dim
        # Inside a page a head's keys lie by dimension, so that a score is made for several tokens
        # at once; its values lie by token.
        self.keys_LNKDP = torch.empty(
            (*pages, heads, head_dim, tokens), dtype=shape.dtype, device=device
        )
        self.values_LNKPD = torch.empty(
            (*pages, heads, tokens, head_dim), dtype=shape.dtype, device=device
        )
        self._pool = PagePool(shape.num_pages)
        self._tables: set[PageTable] = set()

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds; what they keep is forgotten when they are taken."""
        return self._pool.num_free

    @property
    def num_used_pages(self) -> int:
        """Pages that a sequence holds."""
        return self._pool.num_held

    def repeat_layer(self, num_layers: int) -> None:
        """Lets `num_layers` layers use the memory of the only one, each when the last is done."""
        assert self.shape.num_layers == 1
        self.keys_LNKDP = self.keys_LNKDP.expand(num_layers, -1, -1, -1, -1)
        self.values_LNKPD = self.values_LNKPD.expand(num_layers, -1, -1, -1, -1)

    def pages_for(self, num_tokens: int) -> int:
        """Returns how many pages `num_tokens` token slots take."""
        return -(-num_tokens // self.shape.page_tokens)

    def grow(self, table: PageTable, num_tokens: int) -> bool:
        """Gives `table` room for `num_tokens` tokens in all.

        Returns:
            False, with nothing changed, if there are not enough free pages.
        """
        missing = self.pages_for(num_tokens) - len(table)
        if missing <= 0:
            return True
        if missing > self._pool.num_free:
            return False
        self._tables.add(table)
        table.extend(self._pool.take(missing))
        return True

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Returns the pages known by `keys`, up to the first that is not."""
        return self._pool.find(keys)

    def num_claimed(self, num_tokens: int, found: Sequence[int]) -> int:
        """Returns how many free pages a sequence of `num_tokens` takes that begins with `found`."""
        return self.pages_for(num_tokens) - len(found) + self._pool.num_idle(found)

    def freed_without(self, tables: Sequence[PageTable]) -> set[int]:
        """Returns the pages that no one would hold any more if `tables` were released."""
        return self._pool.held_by_none_but(table.pages.tolist() for table in tables)

    def share(self, table: PageTable, found: Sequence[int]) -> None:
        """Lets an empty table begin with pages that were found; they are only to be read."""
        assert len(table) == 0
        if found:
            self._tables.add(table)
            self._pool.hold(found)
            table.extend(found)

    def commit(self, table: PageTable, index: int, key: bytes) -> None:
        """Lets the page at `index` of a table, full and good, be found by `key`."""
        self._pool.commit(int(table.pages[index]), key)

    def release(self, table: PageTable) -> None:
        """Takes every page of `table` back; those that have a key can still be found."""
        if table in self._tables:
            self._tables.remove(table)
            self._pool.drop(table.pages.tolist())
        table.clear()

    def check_writable(self, table: PageTable, position: int) -> None:
        """Asserts that nobody else reads what lies at `position` of a sequence or behind it."""
        pages = table.pages[position // self.shape.page_tokens :].tolist()
        assert all(self._pool.is_private(page) for page in pages), "a shared page is written"

    def check_integrity(self) -> None:
        """Asserts that no page is lost and that every one is held as often as counted."""
        tables = [table.pages.tolist() for table in self._tables]
        assert all(len(pages) == len(set(pages)) for pages in tables), "a table holds a page twice"
        self._pool.check_integrity(tables)
