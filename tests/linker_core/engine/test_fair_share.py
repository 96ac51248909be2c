"""No variant starves under another's flood, and none saves up turns."""

from __future__ import annotations

import pytest

from tests.linker_core.engine.scheduling import Simulation


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
