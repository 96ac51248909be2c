"""Who leaves: by bytes and idle time, enough of them, and nobody in vain."""

from __future__ import annotations

import random
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from linker_core.residency.eviction import Candidate, by_bytes_and_idle_time, choose


def candidate(model: str, unique_bytes: int, idle_s: float) -> Candidate:
    return Candidate(model=model, unique_bytes=unique_bytes, idle_s=idle_s)


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.text("abcdef", min_size=1),
        st.integers(0, 50),
        st.floats(0, 1000, allow_nan=False),
    ),
    max_size=7,
    unique_by=lambda one: one.model,
)


def names(chosen: list[Candidate] | None) -> list[str] | None:
    return None if chosen is None else [one.model for one in chosen]


def test_policy_asks_first_who_held_most_for_longest() -> None:
    small, large, asked = (
        candidate("small", 10, 100.0),
        candidate("large", 1000, 10.0),
        candidate("asked just now", 10_000, 0.05),
    )
    assert by_bytes_and_idle_time([asked, small, large]) == [large, small, asked]


@given(candidates=CANDIDATES, seed=st.integers(0, 99))
def test_policy_does_not_depend_on_the_order_it_is_given(
    candidates: list[Candidate], seed: int
) -> None:
    shuffled = list(candidates)
    random.Random(seed).shuffle(shuffled)
    assert by_bytes_and_idle_time(shuffled) == by_bytes_and_idle_time(candidates)


def test_choose_asks_nobody_when_there_is_enough() -> None:
    assert choose([candidate("a", 10, 1.0)], needed_bytes=5, free_bytes=5) == []


def test_choose_spares_those_whose_leaving_turned_out_superfluous() -> None:
    candidates = [candidate("a", 4, 90.0), candidate("b", 3, 50.0), candidate("c", 20, 1.0)]
    assert names(choose(candidates, needed_bytes=5, free_bytes=0)) == ["a", "b"]
    assert names(choose(candidates, needed_bytes=10, free_bytes=0)) == ["c"]
    assert names(choose(candidates, needed_bytes=23, free_bytes=0)) == ["a", "c"]


def test_choose_of_too_little_is_none() -> None:
    candidates = [candidate("a", 4, 9.0), candidate("b", 3, 9.0)]
    assert names(choose(candidates, needed_bytes=8, free_bytes=1)) == ["a", "b"]
    assert choose(candidates, needed_bytes=9, free_bytes=1) is None
    assert choose([], needed_bytes=1, free_bytes=0) is None


def test_choose_follows_another_policy() -> None:
    candidates = [candidate("a", 4, 9.0), candidate("b", 4, 1.0)]
    newest = choose(candidates, 4, 0, policy=lambda all_: sorted(all_, key=lambda one: one.idle_s))
    assert names(newest) == ["b"]


@given(candidates=CANDIDATES, needed=st.integers(0, 200), free=st.integers(-50, 100))
def test_choose_is_enough_and_without_any_of_them_it_is_not(
    candidates: list[Candidate], needed: int, free: int
) -> None:
    chosen = choose(candidates, needed, free)
    if chosen is None:
        assert free + sum(one.unique_bytes for one in candidates) < needed
        return
    given_back = sum(one.unique_bytes for one in chosen)
    assert free + given_back >= needed
    for rest in combinations(chosen, max(0, len(chosen) - 1)):
        assert not chosen or free + sum(one.unique_bytes for one in rest) < needed
    assert chosen == [one for one in by_bytes_and_idle_time(candidates) if one in chosen]
