"""Whose turn it is: the lane that was served least, so that none starves under another's flood.

A lane is what one tenant asks of one variant. Fair queueing by virtual time: every lane has a clock
of tokens computed for it, and what is left of a step goes to the one whose clock is furthest
behind. Who comes back from a pause has its clock set to that of those who stayed, so that nobody
saves up turns; and nobody's clock may be behind the foremost by more than a bound, so that nobody
waits long for what others had before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from linker_core.engine.prefix_turns import PrefixTurns
from linker_core.engine.sequence import SequenceState
from linker_core.engine.waiting import WaitingQueue


class Lane:
    """The sequences of one tenant and one variant.

    Args:
        key: Of its sequences, see `SequenceState.lane`.
        service: What its clock says.
    """

    def __init__(self, key: tuple[int, str], service: int) -> None:
        self.key = key
        self.service = service  # tokens
        self.last_turn = 0  # larger is later; 0 for none
        self.running: dict[SequenceState, None] = {}
        self.queue = WaitingQueue()
        self.turns = PrefixTurns()  # holds those that wait for a page of one that runs

    @property
    def is_empty(self) -> bool:
        """Whether it has no sequences. Whoever is held back waits for one that runs."""
        return not self.running and not self.queue

    @property
    def num_pages(self) -> int:
        """Pages that its sequences hold, shared ones as often as they are held."""
        return sum(len(sequence.table) for sequence in self.running)

    def waiting(self) -> Iterator[SequenceState]:
        """Yields its waiting sequences in no order."""
        yield from self.queue
        yield from self.turns.waiting()


class FairShare:
    """The lanes that have sequences.

    Args:
        max_lag: Tokens that a lane can be behind the foremost.
    """

    def __init__(self, max_lag: int) -> None:
        self._max_lag = max_lag
        self._lanes: dict[tuple[int, str], Lane] = {}  # ascending, those of one slot together
        self._past: dict[tuple[int, str], int] = {}  # the clocks of lanes that are gone
        self._turns = itertools.count(1)

    def __iter__(self) -> Iterator[Lane]:
        """Yields the lanes in the order of their slots."""
        return iter(self._lanes.values())

    def __getitem__(self, key: tuple[int, str]) -> Lane:
        return self._lanes[key]

    @property
    def num_running(self) -> int:
        """Running sequences of all lanes."""
        return sum(len(lane.running) for lane in self._lanes.values())

    def running(self) -> list[SequenceState]:
        """Returns the running sequences, lane by lane."""
        return [sequence for lane in self._lanes.values() for sequence in lane.running]

    def add(self, sequence: SequenceState) -> None:
        """Queues a new sequence."""
        key = sequence.lane
        clock = self._clock_at(sequence.priority)
        lane = self._lanes.get(key)
        if lane is None:
            lane = Lane(key, self._past.pop(key, 0))
            self._lanes[key] = lane
            self._lanes = dict(sorted(self._lanes.items()))
        if not lane.queue:
            lane.service = max(lane.service, clock)
        lane.queue.push(sequence)

    def drop_if_empty(self, lane: Lane) -> None:
        """Forgets a lane without sequences, but not how far ahead of the others it is."""
        if not lane.is_empty:
            return
        del self._lanes[lane.key]
        if self._lanes:
            self._past[lane.key] = lane.service
        else:
            self._past.clear()  # nobody is left to be ahead of

    def forgive(self) -> None:
        """Sets the clocks forward that are too far behind."""
        earliest = max((lane.service for lane in self), default=0) - self._max_lag
        for lane in self:
            lane.service = max(lane.service, earliest)

    def take_turn(self, lane: Lane) -> None:
        """Notes that it was a lane's turn: among equal clocks it is the last to have another."""
        lane.last_turn = next(self._turns)

    def check_integrity(self) -> None:
        """Asserts that every sequence is in one place."""
        assert list(self._lanes) == sorted(self._lanes)
        for lane in self:
            assert not lane.is_empty
            lane.turns.check_integrity(lane.running)
            waiting = list(lane.waiting())
            assert len(waiting) == len({*waiting} - lane.running.keys()), "a sequence is twice"

    def _clock_at(self, priority: int) -> int:
        """Returns the clock of whoever waits at a priority, or the foremost if nobody does.

        Those that wait at a better priority may be far ahead, and are no measure.
        """
        heads = [(lane.service, lane.queue.head()) for lane in self]
        equals = [service for service, head in heads if head and head.priority == priority]
        return min(equals) if equals else max((service for service, _ in heads), default=0)
