"""Pages are never lost, and known ones stay until their room is needed."""

from __future__ import annotations

import pytest

from linker_core.engine.page_pool import PagePool


def committed(pool: PagePool, *keys: bytes) -> list[int]:
    pages = pool.take(len(keys))
    for page, key in zip(pages, keys, strict=True):
        pool.commit(page, key)
    return pages


def test_take_prefers_pages_whose_memory_is_there() -> None:
    pool = PagePool(5)
    first = pool.take(2)
    pool.drop(first)
    assert set(pool.take(2)) == set(first)
    assert not set(pool.take(3)) & set(first)
    assert pool.num_free == 0


def test_take_spares_known_pages_as_long_as_there_are_others() -> None:
    pool = PagePool(4)
    known = committed(pool, b"a", b"b")
    pool.drop(known)
    assert not set(pool.take(2)) & set(known)
    assert pool.find([b"a", b"b"]) == known
    pool.take(1)
    # The end of a prefix is forgotten before its beginning.
    assert pool.find([b"a", b"b"]) == known[:1]


def test_take_forgets_the_longest_unused_first() -> None:
    pool = PagePool(3)
    pages = {key: committed(pool, key) for key in (b"a", b"b", b"c")}
    for key in (b"c", b"a", b"b"):
        pool.drop(pages[key])
    pool.hold(pages[b"c"])
    pool.drop(pages[b"c"])
    assert pool.take(2) == [*pages[b"a"], *pages[b"b"]]
    assert pool.find([b"c"]) == pages[b"c"]


def test_held_pages_are_free_when_the_last_holder_has_dropped_them() -> None:
    pool = PagePool(2)
    (page,) = committed(pool, b"a")
    pool.hold([page])
    pool.drop([page])
    assert (pool.num_held, pool.num_free, pool.num_idle([page])) == (1, 1, 0)
    pool.drop([page])
    assert (pool.num_held, pool.num_free, pool.num_idle([page])) == (0, 2, 1)
    pool.check_integrity([])


def test_commit_of_a_key_that_is_known_changes_nothing() -> None:
    pool = PagePool(3)
    first = committed(pool, b"a")
    second = committed(pool, b"a")
    assert pool.find([b"a"]) == first
    assert not pool.is_private(first[0])
    assert pool.is_private(second[0])
    pool.drop(second)
    assert pool.take(1) == second
    pool.check_integrity([first, second])


@pytest.mark.parametrize(
    ("tables", "message"), [([[0], [0]], "miscounted"), ([], "miscounted"), ([[1]], "miscounted")]
)
def test_check_integrity_notices_what_is_held_otherwise_than_counted(
    tables: list[list[int]], message: str
) -> None:
    pool = PagePool(2)
    assert pool.take(1) == [0]
    pool.check_integrity([[0]])
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(tables)


def test_check_integrity_notices_a_lost_page() -> None:
    pool = PagePool(2)
    pool.drop(pool.take(1))
    pool._blank.clear()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity([])
