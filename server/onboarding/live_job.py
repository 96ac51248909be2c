"""A job that waits or runs, as those who handle it pass it on. Event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from linker_core.weights.checkpoint import Identity
from server.registry.records import JobStage


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was looked at before a job was accepted."""

    identity: Identity  # of the weight files
    seconds: float  # that took


@dataclass(slots=True, kw_only=True, eq=False)
class LiveJob:
    """A job from its acceptance to its end."""

    id: str
    model: str
    checked: Checked | None = None
    replans: bool = False  # a ready model, which keeps its plan until then
    unwanted: bool = False  # cancelled
    work: asyncio.Task[None] | None = None  # None: it waits
    begun_s: float | None = None  # monotonic; None: it has not begun
    stages: set[JobStage] = field(default_factory=set)  # that the log has named
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def until_done(self, work: Coroutine[Any, Any, None]) -> BaseException | None:
        """Returns how work has ended, in a task of its own so that a job can end alone."""
        task = self.work = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # the server stops
            task.cancel()
            await asyncio.wait({task})
            raise
        return None if task.cancelled() else task.exception()
