"""Whose turn it is to be rendered: template by template, and no template for all of the workers."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

from linker_core.text.template_source import TemplateSource


@dataclass(slots=True, kw_only=True, eq=False)
class Rendering:
    """One request, waiting or in a worker."""

    template: TemplateSource
    variables: bytes
    text: asyncio.Future[str]
    with_source: bool = False  # the worker asked for it
    tried: bool = False  # in a worker that ended for want of memory
    timer: asyncio.TimerHandle | None = None
    late: bool = False

    def fail(self, error: Exception) -> None:
        """Ends it, unless its client has left."""
        if not self.text.done():
            self.text.set_exception(error)


class Turns:
    """The requests that wait and how many of each template run. Event loop only.

    Args:
        max_running: Requests of one template that run at once.
    """

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._waiting: OrderedDict[str, deque[Rendering]] = OrderedDict()  # by digest, next first
        self._running: Counter[str] = Counter()

    def num_waiting(self, digest: str) -> int:
        """Returns how many wait for a template."""
        return len(self._waiting.get(digest, ()))

    def num_running(self, digest: str) -> int:
        """Returns how many of a template run."""
        return self._running[digest]

    def add(self, rendering: Rendering) -> None:
        """Has a request wait for its turn."""
        self._waiting.setdefault(rendering.template.digest, deque()).append(rendering)

    def add_first(self, rendering: Rendering) -> None:
        """Has a request that had its turn be the next of its template again."""
        self._waiting.setdefault(rendering.template.digest, deque()).appendleft(rendering)

    def next(self) -> Rendering | None:
        """Takes the next request of the template that has waited longest for a turn; it runs."""
        for digest, waiting in self._waiting.items():
            if self._running[digest] >= self._max_running:
                continue
            rendering = waiting.popleft()
            if waiting:
                self._waiting.move_to_end(digest)
            else:
                del self._waiting[digest]
            self._running[digest] += 1
            return rendering
        return None

    def end(self, rendering: Rendering) -> None:
        """Notes that a request runs no longer."""
        digest = rendering.template.digest
        self._running[digest] -= 1
        if not self._running[digest]:
            del self._running[digest]

    def forget(self, rendering: Rendering) -> None:
        """Takes a request out of the queue whose client waits no longer."""
        digest = rendering.template.digest
        waiting = self._waiting.get(digest)
        if waiting is not None and rendering in waiting:
            waiting.remove(rendering)
            if not waiting:
                del self._waiting[digest]

    def take_all(self) -> list[Rendering]:
        """Takes everything out of the queue."""
        taken = [rendering for waiting in self._waiting.values() for rendering in waiting]
        self._waiting.clear()
        return taken
