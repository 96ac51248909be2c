"""Tables grow and shrink, share what was found, and never write what others read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from linker_core.engine.kv_cache import KVCache
from linker_core.engine.page_table import PageTable
from tests.linker_core.engine.scheduling import make_cache

KEYS = [b"first", b"second"]


def test_keys_lie_transposed_inside_a_page() -> None:
    cache = make_cache(7, page_tokens=4)
    assert cache.shape.num_tokens == 28
    assert cache.keys_LNKDP.shape == (2, 7, 3, 5, 4)
    assert cache.values_LNKPD.shape == (2, 7, 3, 4, 5)


def test_repeat_layer_shares_one_layers_memory() -> None:
    shape = replace(make_cache(7).shape, num_layers=1)
    cache = KVCache(shape, device=torch.device("cpu"))
    held = cache.keys_LNKDP.untyped_storage().nbytes()
    cache.repeat_layer(6)
    assert len(cache.keys_LNKDP) == len(cache.values_LNKPD) == 6
    cache.values_LNKPD[5, 3] = 2.0
    assert cache.values_LNKPD[0, 3].eq(2.0).all()
    assert cache.keys_LNKDP.untyped_storage().nbytes() == held


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
