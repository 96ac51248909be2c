from __future__ import annotations

import random

from linker_core.engine.sequence import SequenceState
from linker_core.engine.waiting import WaitingQueue
from tests.linker_core.engine.scheduling import make_sequence


def test_queue_gives_the_most_urgent_whatever_comes_and_goes() -> None:
    chance = random.Random(5)
    queue = WaitingQueue()
    waiting: list[SequenceState] = []
    for _ in range(2000):
        choice = chance.random()
        if choice < 0.5 or not waiting:
            waiting.append(make_sequence(priority=chance.randrange(-1, 2)))
            queue.push(waiting[-1])
        elif choice < 0.7:
            popped = queue.pop()
            assert popped is min(waiting, key=lambda s: (s.priority, s.arrival))
            waiting.remove(popped)
            if choice < 0.6:
                queue.push(popped)
                waiting.append(popped)
        else:
            gone = waiting.pop(chance.randrange(len(waiting)))
            queue.discard(gone)
            assert gone not in queue
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)
        assert queue.head() is min(waiting, key=lambda s: (s.priority, s.arrival), default=None)


def test_queue_lets_go_of_discarded_sequences_that_never_reach_the_front() -> None:
    queue = WaitingQueue()
    first = make_sequence(priority=-1)
    queue.push(first)
    for _ in range(1000):
        sequence = make_sequence()
        queue.push(sequence)
        queue.discard(sequence)
    assert len(queue._heap) < 10
    assert queue.head() is first
