"""Requests that are done once however often they arrive: idempotency keys and what became of them.

Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple
from weakref import WeakValueDictionary

from linker_core.errors import ConflictError, NotReadyError
from server.registry.records import ReplayRecord
from server.registry.store import Registry

KEPT_S = 24 * 3600.0


class Once(NamedTuple):
    """A request that is to be done once."""

    key: str
    digest: str  # of all it says

    def used_for(self, job_id: str) -> ReplayRecord:
        """Returns the record that ties it to its job."""
        return ReplayRecord(key=self.key, digest=self.digest, job=job_id, created_at=time.time())


class Replays:
    """What keys were used for in the last `KEPT_S` seconds.

    Args:
        registry: Where that rests.
        clock: Seconds since the epoch.
    """

    def __init__(self, registry: Registry, *, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # A registry that is locked keeps a thread for seconds. One at a time, and no more once it
        # is known: prompts are tokenised by the same threads.
        self._asking = asyncio.Lock()

    @asynccontextmanager
    async def turn(self, once: Once | None) -> AsyncIterator[str | None]:
        """Yields the id of the job that a request has made before, if it has.

        Requests of one key come one after the other, so that the second sees what the first did.

        Raises:
            ConflictError: The key was used for another request.
            NotReadyError: The registry cannot be used.
        """
        if once is None:
            yield None
            return
        lock = self._turns.get(once.key)
        if lock is None:
            lock = self._turns[once.key] = asyncio.Lock()
        async with lock:
            async with self._asking:
                if self._registry.is_failing:
                    msg = "The registry cannot be used at the moment; try again later."
                    raise NotReadyError(msg)
                known = await asyncio.to_thread(self._find, once)
            yield known

    def _find(self, once: Once) -> str | None:
        oldest = self._clock() - KEPT_S
        self._registry.forget_replays(oldest)
        known = self._registry.replay(once.key)
        if known is None:
            return None
        if known.digest != once.digest:
            raise ConflictError(
                "This Idempotency-Key was used for another request. Send that request again as "
                "it was, or this one with a key of its own.",
                param="Idempotency-Key",
            )
        return known.job
