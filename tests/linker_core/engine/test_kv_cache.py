"""Tables grow and shrink, share what was found, and never write what others read."""

from __future__ import annotations

import pytest

from linker_core.engine.page_table import PageTable
from tests.linker_core.engine.scheduling import make_cache

KEYS = [b"first", b"second"]


def test_kv_shape_has_a_slot_for_every_token_of_its_pages() -> None:
    assert make_cache(7).shape.num_tokens == 28


def test_grow_beyond_what_is_free_changes_nothing() -> None:
    cache = make_cache(4)
    held, other = PageTable(), PageTable()
    assert cache.grow(held, 9)
    before = held.pages.tolist()
    assert not cache.grow(held, 17)
    assert not cache.grow(other, 8)
    assert held.pages.tolist() == before
    assert len(other) == 0
    assert (cache.num_used_pages, cache.num_free_pages) == (3, 1)
    cache.check_integrity()


def test_release_gives_every_page_back_once() -> None:
    cache = make_cache(4)
    table = PageTable()
    assert cache.grow(table, 16)
    cache.release(table)
    cache.release(table)
    assert len(table) == 0
    assert cache.num_free_pages == 4
    cache.check_integrity()


def test_share_of_committed_pages_holds_them_once_more() -> None:
    cache = make_cache(6)
    writer, reader = PageTable(), PageTable()
    assert cache.grow(writer, 12)
    for index, key in enumerate(KEYS):
        cache.commit(writer, index, key)
    found = cache.find([*KEYS, b"third"])
    assert found == writer.pages[:2].tolist()
    assert cache.num_claimed(16, found) == 2
    cache.share(reader, found)
    assert cache.grow(reader, 16)
    cache.check_integrity()
    assert cache.num_used_pages == 5
    cache.release(writer)
    assert cache.num_used_pages == 4
    cache.release(reader)
    assert cache.find(KEYS) == found
    # Found or not, as many pages leave the free ones: those that are found are among them.
    assert cache.num_claimed(16, found) == cache.num_claimed(16, []) == 4
    cache.check_integrity()


def test_check_writable_notices_a_page_that_others_can_read() -> None:
    cache = make_cache(6)
    table = PageTable()
    assert cache.grow(table, 12)
    cache.commit(table, 0, KEYS[0])
    cache.check_writable(table, 4)
    with pytest.raises(AssertionError, match="shared"):
        cache.check_writable(table, 3)


def test_check_integrity_notices_a_page_held_twice() -> None:
    cache = make_cache(4)
    first, second = PageTable(), PageTable()
    assert cache.grow(first, 4)
    assert cache.grow(second, 8)
    second.pages[0] = first.pages[0]
    with pytest.raises(AssertionError, match="miscounted"):
        cache.check_integrity()
    second.pages[0] = second.pages[1]
    with pytest.raises(AssertionError, match="twice"):
        cache.check_integrity()
