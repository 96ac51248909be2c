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
