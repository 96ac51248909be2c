"""Which page holds what: taken by sequences, kept for whoever needs the same again, or blank.

A page is *held* by one table or more, *idle* (no one holds it, but its content is known by its key)
or blank. Knows page numbers and keys; no tensor, no sequence.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """Every page of a cache. Each operation costs a constant per page it touches.

    Args:
        num_pages: How many there are, numbered from 0.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._holders: dict[int, int] = {}  # held page -> tables that hold it, at least 1
        self._keys: dict[int, bytes] = {}  # known page, held or idle -> key
        self._known: dict[bytes, int] = {}  # the same the other way round
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._blank: list[int] = []  # given back, unknown; taken again from the end
        self._num_touched = 0  # pages from here on have never been taken

    @property
    def num_held(self) -> int:
        """Pages that a table holds."""
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """Pages that can be taken: blank or idle."""
        return self.num_pages - len(self._holders)

    def take(self, count: int) -> list[int]:
        """Returns `count` pages, held from now on; there are as many free.

        Pages that were in use go first, since their memory is there already; then those never used;
        then the longest unused of the idle ones, which are forgotten.
        """
        assert count <= self.num_free
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            elif self._num_touched < self.num_pages:
                page = self._num_touched
                self._num_touched += 1
            else:
                page, _none = self._idle.popitem(last=False)
                del self._known[self._keys.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Returns the pages known by `keys`, up to the first that is not."""
        pages = []
        for key in keys:
            page = self._known.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_idle(self, pages: Sequence[int]) -> int:
        """Returns how many of some known pages no one holds."""
        return sum(page not in self._holders for page in pages)

    def held_by_none_but(self, tables: Iterable[Sequence[int]]) -> set[int]:
        """Returns the pages that some of the tables hold and no other does."""
        held = Counter(page for table in tables for page in table)
        return {page for page, holders in held.items() if holders == self._holders[page]}

    def hold(self, pages: Iterable[int]) -> None:
        """Holds known pages once more."""
        for page in pages:
            assert page in self._keys
            holders = self._holders.get(page, 0)
            if holders == 0:
                del self._idle[page]
            self._holders[page] = holders + 1

    def drop(self, pages: Sequence[int]) -> None:
        """Ends one holding of each page; known pages stay until their room is needed."""
        # From the last on: what begins a prefix is of use to more, so it is to be forgotten later.
        for page in reversed(pages):
            holders = self._holders[page] - 1
            if holders > 0:
                self._holders[page] = holders
                continue
            del self._holders[page]
            if page in self._keys:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def commit(self, page: int, key: bytes) -> None:
        """Lets a held page be found by `key`, unless another page already is."""
        assert page in self._holders
        assert page not in self._keys
        if key not in self._known:
            self._known[key] = page
            self._keys[page] = key

    def is_private(self, page: int) -> bool:
        """Whether one table holds the page and none can find it, so that it may be written."""
        return self._holders.get(page) == 1 and page not in self._keys

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that every page is in one state, and held as often as `tables` hold it."""
        held = Counter(page for table in tables for page in table)
        assert held == self._holders, "the holders of a page are miscounted"
        blank = [*self._blank, *range(self._num_touched, self.num_pages)]
        everything = [*self._holders, *self._idle, *blank]
        assert len(everything) == len(set(everything)), "a page is in two states"
        assert set(everything) == set(range(self.num_pages)), "a page is lost"
        assert {key: page for page, key in self._keys.items()} == self._known
        assert len(self._keys) == len(self._known), "two pages have one key"
        assert set(self._idle) == set(self._keys) - set(self._holders)
        assert not set(self._keys) & set(blank)
