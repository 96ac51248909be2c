"""A queue of waiting sequences: the most urgent first, each one gone as cheaply as it came."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from linker_core.engine.sequence import SequenceState


class WaitingQueue:
    """Sequences by priority, then by arrival. Thousands may wait."""

    def __init__(self) -> None:
        # A sequence that was discarded stays in the heap until it comes to the front or there are
        # more of them than of the others.
        self._heap: list[tuple[tuple[int, int], SequenceState]] = []
        self._members: set[SequenceState] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: SequenceState) -> bool:
        return sequence in self._members

    def __iter__(self) -> Iterator[SequenceState]:
        """Yields in no order."""
        return iter(self._members)

    def push(self, sequence: SequenceState) -> None:
        """Adds a sequence; one that was discarded does not come again."""
        assert sequence not in self._members
        heapq.heappush(self._heap, (sequence.urgency, sequence))
        self._members.add(sequence)

    def head(self) -> SequenceState | None:
        """Returns the most urgent, None if nothing waits."""
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> SequenceState:
        """Takes the most urgent out; it may be pushed again."""
        head = self.head()
        assert head is not None
        heapq.heappop(self._heap)
        self._members.remove(head)
        return head

    def discard(self, sequence: SequenceState) -> None:
        """Takes any sequence out for good."""
        self._members.discard(sequence)
        if len(self._heap) > 2 * len(self._members):
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
