"""No variant starves under another's flood, and none saves up turns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.engine.fair_share import FairShare
from tests.linker_core.engine.scheduling import Simulation, make_sequence


@pytest.mark.parametrize("num_pages", [40, 400])
def test_fair_share_a_lone_request_under_anothers_flood_is_answered_in_two_steps(
    num_pages: int,
) -> None:
    # 40 pages: the flood holds all of them; 400: it holds all the places.
    model = Simulation(num_pages=num_pages, rows=16, num_seqs=6)
    flood = [model.submit(20, slot=0, max_tokens=100) for _ in range(50)]
    for _ in range(30):
        model.step()
    assert len(model.scheduler.running) > 1
    lone = model.submit(10, slot=1)
    model.step()
    model.step()
    assert lone.num_output >= 1
    assert flood[0] in model.scheduler.running
    while lone not in model.finished:
        before = lone.num_output
        model.step()
        assert lone.num_output == before + 1


@settings(max_examples=150, deadline=None)
@given(
    num_pages=st.integers(30, 60),
    rows=st.integers(8, 20),
    num_seqs=st.integers(2, 6),
    flood=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=40),
    num_steps=st.integers(0, 60),
)
def test_fair_share_whatever_the_flood_a_lone_request_is_answered_in_three_steps(
    num_pages: int, rows: int, num_seqs: int, flood: list[tuple[int, int]], num_steps: int
) -> None:
    model = Simulation(num_pages=num_pages, rows=rows, num_seqs=num_seqs)
    for length, max_tokens in flood:
        model.submit(length, slot=0, max_tokens=max_tokens)
    for _ in range(num_steps):
        model.step()
    # Short enough for the rows that decodes leave; beside the oldest there is room for it.
    lone = model.submit(rows - num_seqs, slot=1, max_tokens=2)
    for _ in range(3):  # the flood's share of them may come first
        model.step()
    assert lone.num_output >= 1
    model.run()
    assert len(model.finished) == len(flood) + 1


def test_fair_share_two_floods_get_the_same_number_of_tokens() -> None:
    model = Simulation(num_pages=400, rows=16, num_seqs=8)
    for number in range(60):
        model.submit(12, slot=0, max_tokens=4)
        if number % 3 == 0:  # the other's requests are fewer and longer
            model.submit(36, slot=1, max_tokens=12)
    served = {0: 0, 1: 0}
    for _ in range(60):
        for sequence, num_tokens in model.step().items():
            served[sequence.slot] += num_tokens
    assert abs(served[0] - served[1]) <= 2 * 36


def test_fair_share_a_pause_saves_up_nothing() -> None:
    model = Simulation(num_pages=400, rows=16, num_seqs=8)
    for _ in range(100):
        model.submit(16, slot=0, max_tokens=1)
    for _ in range(50):
        model.step()
    for _ in range(50):
        model.submit(16, slot=1, max_tokens=1)
    served = {0: 0, 1: 0}
    for _ in range(20):
        for sequence, num_tokens in model.step().items():
            served[sequence.slot] += num_tokens
    assert abs(served[0] - served[1]) <= 32


def test_fair_share_a_newcomer_does_not_wait_for_what_the_urgent_used() -> None:
    model = Simulation(num_pages=400, rows=16, num_seqs=8)
    for _ in range(20):
        model.submit(16, slot=0, priority=1, max_tokens=1)
    model.step()
    for _ in range(40):
        model.submit(16, slot=1, priority=0, max_tokens=1)
    for _ in range(20):
        model.step()
    late = model.submit(16, slot=2, priority=1, max_tokens=1)
    while any(s.priority == 0 for s in model.scheduler.waiting):
        model.step()
    for _ in range(4):
        model.step()
    assert late in model.finished


def test_fair_share_long_answers_of_before_do_not_keep_a_variant_waiting() -> None:
    model = Simulation(num_pages=2000, rows=16, num_seqs=12)
    for _ in range(4):
        model.submit(2, slot=0, max_tokens=500)
    for _ in range(200):  # alone, so at nobody's cost
        model.step()
    for _ in range(300):
        model.submit(16, slot=1, max_tokens=1)
    model.step()
    late = model.submit(8, slot=0, max_tokens=1)
    steps = 0
    while late not in model.finished:
        model.step()
        steps += 1
    # 8 steps' tokens are what it may have to wait for; it goes on being served 4 of 16 meanwhile.
    assert steps <= 8 * 16 / (12 - 4) + 2
    assert model.scheduler.waiting


def test_fair_share_lanes_that_are_equally_far_behind_take_turns() -> None:
    model = Simulation(num_pages=400, rows=8, num_seqs=4)
    for slot, number in ((1, 30), (2, 3)):
        for _ in range(number):
            model.submit(2, slot=slot, max_tokens=1)
    for _ in range(30):
        # One row a step is left to the others, less than it takes to catch up.
        model.submit(7, slot=0, priority=-1, max_tokens=1)
        model.step()
    done = [sequence.slot for sequence in model.finished if sequence.slot != 0]
    assert done.count(2) == 3
    assert done.count(1) >= 3


@pytest.mark.parametrize("num_pages", [40, 400])
def test_fair_share_a_tenant_is_answered_in_two_steps_under_anothers_flood_of_one_variant(
    num_pages: int,
) -> None:
    model = Simulation(num_pages=num_pages, rows=16, num_seqs=6)
    for _ in range(50):
        model.submit(20, tenant="flood", salt="flood", max_tokens=100)
    for _ in range(30):
        model.step()
    lone = model.submit(10, tenant="quiet", salt="quiet")
    model.step()
    model.step()
    assert lone.num_output >= 1


@settings(max_examples=100, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers(1, 20)), max_size=25
    )
)
def test_fair_share_all_of_several_tenants_and_variants_end(
    asked: list[tuple[int, str, int]],
) -> None:
    model = Simulation(num_pages=20, rows=16, num_seqs=4)
    for slot, tenant, length in asked:
        model.submit(length, slot=slot, tenant=tenant, salt=tenant, max_tokens=5)
    model.run()
    assert len(model.finished) == len(asked)


def test_fair_share_rows_of_one_variant_stay_together_whoever_asks() -> None:
    model = Simulation(num_pages=60, rows=32, num_seqs=8)
    for slot, tenant in [(1, "b"), (0, "b"), (1, "a"), (0, "a")]:
        model.submit(3, slot=slot, tenant=tenant, salt=tenant)
    assert [sequence.slot for sequence in model.step()] == [0, 0, 1, 1]


def test_forgive_bounds_how_far_behind_anyone_is() -> None:
    lanes = FairShare(max_lag=10)
    for slot, service in ((3, 5), (1, 995), (2, 1000)):
        lanes.add(make_sequence(slot=slot))
        lanes[slot, ""].service = service
    lanes.forgive()
    assert [(lane.key[0], lane.service) for lane in lanes] == [(1, 995), (2, 1000), (3, 990)]


def test_add_sets_the_clock_by_those_who_wait_at_the_same_priority() -> None:
    lanes = FairShare(max_lag=10_000)
    for slot, priority, service in ((1, 0, 1000), (2, 1, 300), (3, 1, 200)):
        lanes.add(make_sequence(slot=slot, priority=priority))
        lanes[slot, ""].service = service
    for slot, priority in ((4, 0), (5, 1), (6, 2)):
        lanes.add(make_sequence(slot=slot, priority=priority))
    assert [lanes[slot, ""].service for slot in (4, 5, 6)] == [1000, 200, 1000]


def test_drop_if_empty_remembers_the_clock_while_others_are_there() -> None:
    lanes = FairShare(max_lag=10_000)
    first, second = make_sequence(slot=0), make_sequence(slot=1)
    for sequence in (first, second):
        lanes.add(sequence)
    lanes[0, ""].service = 700
    lanes.drop_if_empty(lanes[0, ""])
    assert 0 in [lane.key[0] for lane in lanes]
    lanes[0, ""].queue.discard(first)
    lanes.drop_if_empty(lanes[0, ""])
    assert [lane.key[0] for lane in lanes] == [1]
    lanes.add(first)
    assert lanes[0, ""].service == 700
