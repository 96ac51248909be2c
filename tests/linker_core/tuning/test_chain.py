from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from linker_core.sharing.rungs import AnyRung, Residual, Rung
from linker_core.tuning.chain import Chain, Offer

STANDING = 100
NAMES = ("a", "b", "c")
RUNGS: tuple[AnyRung, ...] = (
    Rung.ALIAS,
    *(Residual(rank=rank, factor_bits=8) for rank in (1, 2, 3)),
)
offers = st.lists(st.tuples(st.integers(0, 120), st.floats(0.0, 1.0)), min_size=1, max_size=4).map(
    lambda pairs: [Offer(*pair, rung) for pair, rung in zip(pairs, RUNGS, strict=False)]
)
tables = st.lists(offers, min_size=1, max_size=3).map(
    lambda lists: dict(zip(NAMES, lists, strict=False))
)
Table = Mapping[str, list[Offer]]


def chain(table: Table) -> Chain:
    return Chain(dict.fromkeys(table, Rung.OWN), dict.fromkeys(table, STANDING), table)


def size_and_harm(table: Table, rungs: Mapping[str, AnyRung]) -> tuple[int, float]:
    own = Offer(STANDING, 0.0, Rung.OWN)
    taken = [
        next(offer for offer in (own, *table[name]) if offer.rung == rung)
        for name, rung in rungs.items()
    ]
    return sum(offer.nbytes for offer in taken), sum(offer.error for offer in taken)


def all_plans(table: Table) -> list[tuple[int, float]]:
    rungs = [[Rung.OWN, *(offer.rung for offer in table[name])] for name in table]
    return [
        size_and_harm(table, dict(zip(table, choice, strict=True))) for choice in product(*rungs)
    ]


@given(tables)
def test_no_plan_beats_one_on_the_chain(table: Table) -> None:
    found = chain(table)
    plans = all_plans(table)
    for length in range(len(found.steps) + 1):
        size, harm = size_and_harm(table, found.rungs(length))
        assert not [plan for plan in plans if plan[0] <= size and plan[1] < harm - 1e-9], (
            "less harm in no more bytes"
        )


@given(tables)
def test_steps_save_bytes_and_do_harm_by_rising_steepness(table: Table) -> None:
    found = chain(table)
    sizes = [size_and_harm(table, found.rungs(i)) for i in range(len(found.steps) + 1)]
    for step, before, after in zip(found.steps, sizes, sizes[1:], strict=False):
        assert before[0] - after[0] == step.saved > 0
        assert after[1] - before[1] == pytest.approx(step.harm, abs=1e-9)
    steepness = [step.steepness for step in found.steps]
    assert steepness == sorted(steepness)
    least = sum(min(STANDING, *(offer.nbytes for offer in table[name])) for name in table)
    assert sizes[-1][0] == least == len(table) * STANDING - found.most_saved


@given(tables, st.floats(0.0, 1.0))
def test_a_saving_is_reached_with_no_step_more_than_it_needs(table: Table, share: float) -> None:
    found = chain(table)
    wanted = int(share * found.most_saved)
    size, harm = size_and_harm(table, rungs := found.saving(wanted))
    assert len(table) * STANDING - size >= wanted
    length = next(
        i
        for i in range(len(found.steps) + 1)
        if len(table) * STANDING - size_and_harm(table, found.rungs(i))[0] >= wanted
    )
    assert harm <= size_and_harm(table, found.rungs(length))[1] + 1e-9
    saved = {(step.name, step.rung): step.saved for step in found.steps}
    for name, rung in rungs.items():  # none of the last steps could still be taken back
        if (name, rung) in saved:
            assert len(table) * STANDING - size - saved[name, rung] < wanted


@given(tables)
def test_length_of_harm_is_the_longest_that_stays_within(table: Table) -> None:
    found = chain(table)
    total = 0.0
    for length, step in enumerate(found.steps):
        reached = found.length_of_harm(total)
        assert reached >= length
        assert all(later.harm == 0 for later in found.steps[length:reached])
        total += step.harm
    assert found.length_of_harm(math.inf) == len(found.steps)


def test_a_rung_between_worse_ones_is_passed_over() -> None:
    """Half of the bytes for almost all of the harm is worse than a mix of the two ends."""
    table = {"a": [Offer(50, 0.9, RUNGS[1]), Offer(0, 1.0, RUNGS[0])]}
    assert [step.rung for step in chain(table).steps] == [Rung.ALIAS]
    table = {"a": [Offer(50, 0.1, RUNGS[1]), Offer(0, 1.0, RUNGS[0])]}
    assert [step.rung for step in chain(table).steps] == [RUNGS[1], Rung.ALIAS]


@given(tables, st.data())
def test_guess_beside_an_end_is_moved_into_what_lies_between(
    table: Table, data: st.DataObject
) -> None:
    found = chain(table)
    assume(len(found.steps) >= 2)
    fewer = data.draw(st.integers(0, len(found.steps) - 2))
    more = data.draw(st.integers(fewer + 2, len(found.steps)))
    guess = data.draw(st.integers(fewer, more))
    sizes = [size_and_harm(table, found.rungs(n))[0] + 1 for n in range(len(found.steps) + 1)]
    moved = found.between(fewer, more, guess, margin=0.2)
    assert fewer < moved < more
    farthest = math.log(sizes[fewer] / sizes[more])
    ways = {n: math.log(sizes[fewer] / sizes[n]) / farthest for n in range(fewer, more)}
    clear = [n for n, way in ways.items() if 0.21 <= way <= 0.79]
    if guess in clear:
        assert moved == guess
    elif clear:
        assert 0.19 <= ways[moved] <= 0.81
