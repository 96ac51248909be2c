"""What runs next: decodes before prefills, waiting in order, pages by age, nothing lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linker_core.engine.messages import SamplingParams
from linker_core.engine.scheduler import Schedule, Scheduler
from linker_core.engine.sequence import SequenceState
from linker_core.errors import InsufficientCapacityError
from tests.linker_core.engine.test_kv_cache import make_cache

ARRIVALS = itertools.count()


def make_scheduler(*, num_pages: int = 64, rows: int = 8, num_seqs: int = 4) -> Scheduler:
    return Scheduler(make_cache(num_pages), max_batch_tokens=rows, max_num_seqs=num_seqs)


def add(scheduler: Scheduler, num_prompt: int, *, slot: int = 0, max_tokens: int = 9) -> str:
    arrival = next(ARRIVALS)
    state = SequenceState(
        request_id=f"r{arrival}",
        model="m",
        slot=slot,
        vocab_size=10,
        tokens=[1] * num_prompt,
        num_prompt=num_prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        arrival=arrival,
    )
    scheduler.add(state)
    return state.request_id


def run(scheduler: Scheduler) -> Schedule:
    """One step whose model always chooses token 1."""
    plan = scheduler.schedule()
    asking = [chunk.sequence for chunk in plan.chunks if chunk.wants_token]
    for chunk in plan.chunks:
        scheduler.advance(chunk)
    for sequence in asking:
        if sequence.append(1) is not None:
            scheduler.remove(sequence)
    scheduler.check_integrity()
    return plan


def lengths(plan: Schedule) -> dict[str, int]:
    return {chunk.sequence.request_id: chunk.num_tokens for chunk in plan.chunks}


def test_schedule_decodes_come_before_prefill_chunks_within_the_budget() -> None:
    scheduler = make_scheduler(rows=8)
    short = add(scheduler, 3)
    assert lengths(run(scheduler)) == {short: 3}
    long, late = add(scheduler, 10), add(scheduler, 4)
    assert lengths(run(scheduler)) == {short: 1, long: 7}
    assert lengths(run(scheduler)) == {short: 1, long: 3, late: 4}
    assert lengths(run(scheduler)) == {short: 1, long: 1, late: 1}


def test_schedule_admits_in_order_up_to_the_limit() -> None:
    scheduler = make_scheduler(rows=8, num_seqs=2)
    first, second = add(scheduler, 2, max_tokens=1), add(scheduler, 2)
    third = add(scheduler, 2)
    assert lengths(run(scheduler)) == {first: 2, second: 2}
    assert lengths(run(scheduler)) == {second: 1, third: 2}


def test_schedule_keeps_the_rows_of_a_slot_together() -> None:
    scheduler = make_scheduler(rows=16)
    for slot in (2, 0, 2, 1):
        add(scheduler, 2, slot=slot)
    assert [chunk.sequence.slot for chunk in run(scheduler).chunks] == [0, 1, 2, 2]


def test_schedule_preempts_the_newest_and_runs_it_again_first() -> None:
    scheduler = make_scheduler(num_pages=4, rows=16)
    old, new = add(scheduler, 6), add(scheduler, 3)
    late = add(scheduler, 3)
    # Two pages and one; the third sequence would leave no page for those that run.
    assert lengths(run(scheduler)) == {old: 6, new: 3}
    assert scheduler.cache.num_used_pages == 3
    preempted_at = None
    for step in range(40):
        plan = lengths(run(scheduler))
        if preempted_at is None and scheduler.num_preemptions:
            preempted_at = step
            assert new not in plan
            assert [s.request_id for s in scheduler.waiting] == [new, late]
        if not scheduler.running and not scheduler.waiting:
            break
    assert preempted_at is not None
    assert not list(scheduler.sequences())


def test_schedule_a_sequence_that_can_never_fit_fails_instead_of_looping() -> None:
    scheduler = make_scheduler(num_pages=2, rows=16)
    too_long, growing = add(scheduler, 9), add(scheduler, 7, max_tokens=50)
    plan = run(scheduler)
    assert [failed.sequence.request_id for failed in plan.failed] == [too_long]
    assert isinstance(plan.failed[0].error, InsufficientCapacityError)
    assert lengths(plan) == {growing: 7}
    for _ in range(5):
        plan = run(scheduler)
        if plan.failed:
            break
    assert [failed.sequence.request_id for failed in plan.failed] == [growing]
    assert not list(scheduler.sequences())
    assert scheduler.cache.num_used_pages == 0


def test_remove_frees_running_and_waiting_alike() -> None:
    scheduler = make_scheduler(num_seqs=1)
    add(scheduler, 3)
    add(scheduler, 3)
    run(scheduler)
    running, waiting = scheduler.sequences()
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.check_integrity()
    assert scheduler.cache.num_used_pages == 0
    with pytest.raises(ValueError, match="not in"):
        scheduler.remove(running)


@given(
    num_pages=st.integers(1, 12),
    rows=st.integers(1, 12),
    num_seqs=st.integers(1, 6),
    operations=st.lists(
        st.tuples(
            st.sampled_from(["add", "step", "step", "step", "abort"]),
            st.integers(1, 30),
            st.integers(1, 20),
        ),
        max_size=60,
    ),
)
def test_randomised_traffic_ends_and_keeps_integrity(
    num_pages: int, rows: int, num_seqs: int, operations: list[tuple[str, int, int]]
) -> None:
    scheduler = make_scheduler(num_pages=num_pages, rows=rows, num_seqs=num_seqs)
    for operation, first, second in operations:
        if operation == "add":
            add(scheduler, first, slot=second % 3, max_tokens=second)
        elif operation == "step":
            plan = run(scheduler)
            assert sum(chunk.num_tokens for chunk in plan.chunks) <= rows
            assert all(chunk.num_tokens >= 1 for chunk in plan.chunks)
        elif live := list(scheduler.sequences()):
            scheduler.remove(live[first % len(live)])
        scheduler.check_integrity()
    # Whatever is left ends by itself: the oldest always moves on.
    for _ in range(60 * 60 * 8):
        if not list(scheduler.sequences()):
            break
        plan = run(scheduler)
        assert plan.chunks or plan.failed or scheduler.num_preemptions
    assert not list(scheduler.sequences())
    assert scheduler.cache.num_used_pages == 0
