"""Pages are never held twice, never lost, and stay together where they can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linker_core.engine.kv_cache import KVCache, KVShape, PageTable

CPU = torch.device("cpu")


def make_cache(num_pages: int, page_tokens: int = 4) -> KVCache:
    shape = KVShape(
        num_pages=num_pages,
        page_tokens=page_tokens,
        num_layers=2,
        num_kv_heads=3,
        head_dim=5,
        dtype=torch.float32,
    )
    return KVCache(shape, device=CPU)


def test_kv_shape_has_a_slot_for_every_token_of_its_pages() -> None:
    cache = make_cache(7)
    assert cache.shape.num_tokens == 28
    assert cache.keys_LKSD.shape == cache.values_LKSD.shape == (2, 3, 28, 5)


def test_grow_prefers_the_page_behind_the_last() -> None:
    cache = make_cache(16)
    first, second = PageTable(), PageTable()
    for num_tokens in (4, 8, 12):
        assert cache.grow(first, num_tokens)
        assert cache.grow(second, num_tokens)
    assert first.contiguous
    assert second.contiguous
    assert not set(first.pages) & set(second.pages)


def test_grow_takes_what_is_left_in_pieces() -> None:
    cache = make_cache(6)
    tables = [PageTable() for _ in range(6)]
    for table in tables:
        assert cache.grow(table, 4)
    by_page = {table.pages[0]: table for table in tables}
    for page in (1, 3, 4):
        cache.release(by_page[page])
    scattered = PageTable()
    assert cache.grow(scattered, 12)
    assert scattered.pages == [3, 4, 1]
    assert not scattered.contiguous
    slots = cache.token_slots(scattered, 6, 10)
    assert slots.tolist() == [18, 19, 4, 5]
    cache.check_integrity()


def test_grow_beyond_what_is_free_changes_nothing() -> None:
    cache = make_cache(4)
    held, other = PageTable(), PageTable()
    assert cache.grow(held, 9)
    before = list(held.pages)
    assert not cache.grow(held, 17)
    assert not cache.grow(other, 8)
    assert held.pages == before
    assert other.pages == []
    assert cache.num_used_pages == 3


def test_check_integrity_notices_a_page_held_twice_or_lost() -> None:
    cache = make_cache(4)
    first, second = PageTable(), PageTable()
    assert cache.grow(first, 4)
    assert cache.grow(second, 4)
    second.pages[0] = first.pages[0]
    with pytest.raises(AssertionError, match="twice"):
        cache.check_integrity()
    second.pages.clear()
    with pytest.raises(AssertionError, match="lost"):
        cache.check_integrity()


@given(
    num_pages=st.integers(1, 20),
    operations=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 40), st.booleans()), max_size=60
    ),
)
def test_randomised_grow_and_release_keep_integrity(
    num_pages: int, operations: list[tuple[int, int, bool]]
) -> None:
    cache = make_cache(num_pages)
    tables = [PageTable() for _ in range(6)]
    for number, num_tokens, release in operations:
        table = tables[number]
        if release:
            cache.release(table)
            assert table.pages == []
        else:
            missing = cache.pages_for(num_tokens) - len(table.pages)
            fits = missing <= cache.num_free_pages
            before = list(table.pages)
            assert cache.grow(table, num_tokens) is fits
            assert table.pages[: len(before)] == before
            if fits:
                slots = cache.token_slots(table, 0, num_tokens)
                assert len(np.unique(slots)) == num_tokens
        cache.check_integrity()
    for table in tables:
        cache.release(table)
    assert cache.num_free_pages == num_pages
