"""Who gives way when there is no room, and that everyone gets there in the end."""

from __future__ import annotations

from tests.linker_core.engine.scheduling import Simulation, answer


def test_schedule_urgent_sequences_go_first_and_take_room_from_the_patient() -> None:
    model = Simulation(rows=8, num_seqs=2)
    patient = [model.submit(4, priority=5) for _ in range(3)]
    model.step()
    assert model.scheduler.running == patient[:2]
    urgent = model.submit(5, priority=-1)
    assert model.step() == {patient[0]: 1, urgent: 5}
    assert model.scheduler.num_preemptions == 1
    model.run()
    assert model.finished == [patient[0], urgent, *patient[1:]]
    assert all(s.tokens[s.num_prompt :] == answer(s) for s in (*patient, urgent))


def test_schedule_preempts_the_newest_and_runs_it_again_before_later_ones() -> None:
    model = Simulation(num_pages=4, rows=16)
    old, new, late = model.submit(6), model.submit(3), model.submit(3)
    # Two pages and one; the third sequence would leave no page for those that run.
    assert model.step() == {old: 6, new: 3}
    assert model.cache.num_used_pages == 3
    while model.scheduler.num_preemptions == 0:
        model.step()
    assert model.scheduler.running == [old]
    model.run()
    assert model.finished == [old, new, late]


def test_fair_share_preempts_nobody_for_a_variant_where_each_has_one() -> None:
    model = Simulation(num_seqs=2)
    for slot in range(4):
        model.submit(4, slot=slot)
    model.run()
    assert model.scheduler.num_preemptions == 0
    assert len(model.finished) == 4


def test_fair_share_takes_room_from_the_variant_that_holds_most() -> None:
    model = Simulation(num_pages=64, rows=16, num_seqs=5)
    few = [model.submit(2, slot=0, max_tokens=40) for _ in range(2)]
    many = [model.submit(2, slot=1, max_tokens=40) for _ in range(3)]
    model.step()
    lone = model.submit(2, slot=2, max_tokens=40)
    model.step()
    assert model.scheduler.running == [*few, *many[:2], lone]


def test_pages_are_taken_from_the_variant_that_holds_most_of_them() -> None:
    model = Simulation(num_pages=16, rows=64, num_seqs=8)
    small = [model.submit(3, slot=0, max_tokens=40) for _ in range(3)]
    large = [model.submit(12, slot=1, max_tokens=40) for _ in range(2)]
    newest = model.submit(3, slot=2, max_tokens=40)
    while model.scheduler.num_preemptions == 0:
        model.step()
    assert model.scheduler.waiting == [large[1]]
    assert model.scheduler.running == [*small, large[0], newest]


def test_the_oldest_gives_nothing_back_to_its_equals() -> None:
    model = Simulation(num_pages=8, rows=64, num_seqs=8)
    oldest = model.submit(16, slot=0, max_tokens=16)
    others = [model.submit(2, slot=1, max_tokens=16) for _ in range(2)]
    steps = 0
    while oldest not in model.finished:
        assert oldest not in model.scheduler.waiting or steps == 0
        model.step()
        steps += 1
    assert steps == 16
    assert model.scheduler.num_preemptions > 0
    model.run()
    assert {*model.finished} == {oldest, *others}


def test_nobody_is_preempted_where_that_would_not_be_enough() -> None:
    model = Simulation(num_pages=12, rows=64, num_seqs=8)
    oldest = model.submit(24, slot=0, max_tokens=8)
    other = model.submit(3, slot=0, max_tokens=30)
    model.step()
    lone = model.submit(24, slot=1, max_tokens=1)
    while oldest not in model.finished:
        model.step()
    assert model.scheduler.num_preemptions == 0
    assert model.step() == {other: 1, lone: 24}


def test_sequences_whose_pages_are_shared_are_not_preempted_in_vain() -> None:
    model = Simulation(num_pages=16, rows=64, num_seqs=8)
    prompt = list(range(10, 42))
    crowd = [model.submit(prompt, max_tokens=30) for _ in range(4)]
    for _ in range(4):
        model.step()
    assert len(model.scheduler.running) == 4
    # All but the first together have 5 pages that the first does not hold; 8 are needed.
    large = model.submit(30, slot=1, max_tokens=3)
    model.step()
    assert model.scheduler.running == crowd
    assert model.scheduler.num_preemptions == 0
    model.run()
    assert {large, *crowd} == set(model.finished)


def test_nobody_is_preempted_where_too_few_may_be() -> None:
    model = Simulation(num_pages=16, rows=64, num_seqs=8)
    running = [model.submit(12, slot=slot, max_tokens=30) for slot in (0, 1, 1)]
    model.step()
    # Of the two of one variant only the second may go, and its pages are not enough.
    model.submit(36, slot=2, max_tokens=3)
    model.step()
    assert model.scheduler.running == running
    assert model.scheduler.num_preemptions == 0
