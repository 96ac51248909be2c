"""What has changed since a listener last looked: models by name, jobs by their newest record.

Event loop only. However often something changes between two looks, a listener hears of it once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from linker_core.errors import QueueFullError
from server.registry.records import JobRecord

MAX_LISTENERS = 64
MAX_UNREAD = 4096  # changes that a listener has yet to take


class Changes(NamedTuple):
    """What is new."""

    models: list[str]
    jobs: list[JobRecord]


class Feed:
    """Tells listeners what changes."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()

    def note_model(self, name: str) -> None:
        """Says that a model came, went or changed."""
        for listener in self._listeners:
            listener.note_model(name)

    def note_job(self, job: JobRecord) -> None:
        """Says where a job is now."""
        for listener in self._listeners:
            listener.note_job(job)

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """Yields a listener that hears of all changes from here on.

        Raises:
            QueueFullError: `MAX_LISTENERS` are listening.
        """
        if len(self._listeners) >= MAX_LISTENERS:
            raise QueueFullError(f"{MAX_LISTENERS} clients are following events; try again later.")
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)


class Listener:
    """Collects changes until they are taken; one that is too far behind collects no more."""

    def __init__(self) -> None:
        self._models: dict[str, None] = {}  # in the order of their first change
        self._jobs: dict[str, JobRecord] = {}
        self._lost = False
        self._new = asyncio.Event()

    def note_model(self, name: str) -> None:
        """Remembers that a model changed."""
        self._models[name] = None
        self._noted()

    def note_job(self, job: JobRecord) -> None:
        """Remembers where a job is, and forgets where it was."""
        self._jobs[job.id] = job
        self._noted()

    async def take(self) -> Changes:
        """Waits until something is new, and takes it.

        Raises:
            QueueFullError: More than `MAX_UNREAD` things have changed since the last call.
        """
        await self._new.wait()
        if self._lost:
            raise QueueFullError("The events were not read fast enough; ask for them anew.")
        changes = Changes(list(self._models), list(self._jobs.values()))
        self._clear()
        self._new.clear()
        return changes

    def _noted(self) -> None:
        self._lost = self._lost or len(self._models) + len(self._jobs) > MAX_UNREAD
        if self._lost:
            self._clear()
        self._new.set()

    def _clear(self) -> None:
        self._models.clear()
        self._jobs.clear()
