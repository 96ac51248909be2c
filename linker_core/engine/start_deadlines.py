"""When sequences have to have begun. Knows them by their ids alone, and no scheduler."""

from __future__ import annotations

import heapq
from collections.abc import Iterator


class StartDeadlines:
    """Ids by when they are due, in seconds of the engine's clock.

    An entry stays until then, whatever becomes of its sequence: some hundred bytes each.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, request_id: str, due_s: float) -> None:
        """Remembers a sequence."""
        heapq.heappush(self._heap, (due_s, request_id))

    def due(self, now_s: float) -> Iterator[str]:
        """Yields the ids that are due, the earliest first, once each."""
        while self._heap and self._heap[0][0] <= now_s:
            yield heapq.heappop(self._heap)[1]
