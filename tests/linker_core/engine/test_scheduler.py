"""What runs next: decodes before prompts, the urgent before the patient, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.engine.sequence import SequenceState
from tests.linker_core.engine.scheduling import Simulation, answer


def test_schedule_decodes_come_before_prompts_within_the_budget() -> None:
    model = Simulation(rows=8)
    short = model.submit(3)
    assert model.step() == {short: 3}
    long, late = model.submit(10), model.submit(4)
    assert model.step() == {short: 1, long: 7}
    assert model.step() == {short: 1, long: 3, late: 4}
    assert model.step() == {short: 1, long: 1, late: 1}


def test_schedule_admits_in_order_up_to_the_limit() -> None:
    model = Simulation(num_seqs=2)
    first, second = model.submit(2, max_tokens=1), model.submit(2)
    third = model.submit(2)
    assert model.step() == {first: 2, second: 2}
    assert model.step() == {second: 1, third: 2}


def test_schedule_keeps_the_rows_of_a_slot_together_in_the_order_of_slots() -> None:
    model = Simulation(rows=16)
    for slot in (2, 0, 2, 1):
        model.submit(2, slot=slot)
    assert [sequence.slot for sequence in model.step()] == [0, 1, 2, 2]
    model.submit(2, slot=1)
    assert [sequence.slot for sequence in model.step()] == [0, 1, 2, 2]


def test_schedule_makes_no_more_rows_of_logits_than_sequences_may_run() -> None:
    model = Simulation(rows=32, num_seqs=4)
    decoding = model.submit(2)
    model.step()
    scored = model.submit(8, prompt_logprobs=0, max_tokens=2)
    plain = model.submit(6)
    # Three rows of logits are left for the prompt that wants all of its own; the other prompt
    # goes as far as it can without one.
    assert model.step() == {decoding: 1, scored: 3, plain: 5}
    assert model.step() == {decoding: 1, scored: 2, plain: 1}
    assert model.step() == {decoding: 1, scored: 2, plain: 1}
    assert model.step() == {decoding: 1, scored: 1, plain: 1}
    assert scored.num_output == 1
    model.run()
    assert scored.tokens[8:] == answer(scored)


def test_schedule_a_sequence_that_can_never_fit_fails_alone() -> None:
    model = Simulation(num_pages=2, rows=16)
    too_long, growing = model.submit(9), model.submit(7, max_tokens=50)
    assert model.step() == {growing: 7}
    assert model.failed == [too_long]
    model.run()
    assert model.failed == [too_long, growing]
    assert growing.num_output == 2  # up to the last token slot, and the token after it
    assert model.finished == []
    assert model.cache.num_used_pages == 0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_remove_frees_the_pages_at_once_in_any_state(steps: int) -> None:
    model = Simulation(rows=8, num_seqs=1)
    running, waiting = model.submit(12), model.submit(3)
    for _ in range(steps):
        model.step()
    model.scheduler.remove(waiting)
    model.scheduler.remove(running)
    model.scheduler.check_integrity()
    assert model.cache.num_used_pages == 0
    assert not model.scheduler.running
    assert not model.scheduler.waiting
    assert model.step() == {}


def test_remove_of_thousands_that_wait_leaves_nothing_behind() -> None:
    model = Simulation(rows=8, num_seqs=1)
    running = model.submit(4, max_tokens=50)
    flood = [model.submit(4) for _ in range(3000)]
    model.step()
    for sequence in flood[1:]:
        model.scheduler.remove(sequence)
    assert model.scheduler.waiting == flood[:1]
    model.run()
    assert model.finished == [running, flood[0]]


Operation = tuple[str, int, int, int]
OPERATIONS: st.SearchStrategy[list[Operation]] = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "step", "step", "step", "abort", "fault"]),
        st.integers(1, 30),
        st.integers(1, 20),
        st.integers(0, 15),
    ),
    max_size=70,
)


def submit(model: Simulation, length: int, max_tokens: int, kind: int) -> SequenceState:
    """A sequence whose prompt begins as many others do, of one of four tenants."""
    prompt = [1] * (length - length % 3) + [2] * (length % 3)
    return model.submit(
        prompt,
        slot=kind % 2,
        salt="a" if kind % 4 >= 2 else "b",
        priority=kind % 3 - 1 if kind >= 12 else 0,
        max_tokens=max_tokens,
        prompt_logprobs=0 if kind == 11 else None,
    )


@settings(max_examples=300, deadline=None)
@given(
    num_pages=st.integers(1, 12),
    rows=st.integers(1, 12),
    num_seqs=st.integers(1, 6),
    operations=OPERATIONS,
)
def test_randomised_traffic_ends_with_everyones_own_answer(
    num_pages: int, rows: int, num_seqs: int, operations: list[Operation]
) -> None:
    model = Simulation(num_pages=num_pages, rows=rows, num_seqs=num_seqs)
    alive: list[SequenceState] = []
    aborted: list[SequenceState] = []
    for operation, first, second, third in operations:
        alive = [s for s in alive if s not in model.finished and s not in model.failed]
        if operation == "submit":
            alive.append(submit(model, first, second, third))
        elif operation == "step":
            model.step()
        elif operation == "fault":
            model.step(faulty=alive[third % 2 :: 2])
        elif alive:
            aborted.append(alive.pop(first % len(alive)))
            model.scheduler.remove(aborted[-1])
            assert len(aborted[-1].table) == 0
        model.scheduler.check_integrity()
    # Whatever is left ends by itself: the most urgent always moves on.
    model.run(max_steps=60 * 50)
    assert {*alive} <= {*model.finished, *model.failed}
    assert not {*aborted} & {*model.finished, *model.failed}
    for sequence in model.finished:
        assert sequence.tokens[sequence.num_prompt :] == answer(sequence)
    assert model.cache.num_used_pages == 0


@pytest.mark.parametrize("num_pages", [6, 7, 9])
@pytest.mark.parametrize("num_slots", [1, 4])
def test_flood_in_a_tiny_cache_is_answered_whole(num_pages: int, num_slots: int) -> None:
    model = Simulation(num_pages=num_pages, rows=6, num_seqs=6)
    sequences = [
        model.submit(1 + number % 11, slot=number % num_slots, max_tokens=1 + 7 * number % 12)
        for number in range(120)
    ]
    model.run()
    assert {*model.finished} == {*sequences}
    assert model.scheduler.num_preemptions > 0
    for sequence in sequences:
        assert sequence.tokens[sequence.num_prompt :] == answer(sequence)
