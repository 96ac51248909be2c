"""How much work is taken: a bound on sequences in flight, and the drain at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from linker_core.errors import NotReadyError, QueueFullError


class Gate:
    """Counts sequences at admission, before any work. Event loop only.

    Args:
        limit: Sequences waiting or running at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inflight = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.draining = False

    @contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        """Holds places for the sequences of one request.

        Raises:
            NotReadyError: The server is shutting down.
            QueueFullError: Too many sequences are in flight.
        """
        self.check_open()
        if self._inflight + num_sequences > self._limit:
            raise QueueFullError("Too many requests are waiting; try again in a moment.")
        self._inflight += num_sequences
        self._empty.clear()
        try:
            yield
        finally:
            self._inflight -= num_sequences
            if not self._inflight:
                self._empty.set()

    def check_open(self) -> None:
        """Refuses new work while the server drains.

        Raises:
            NotReadyError: It does.
        """
        if self.draining:
            raise NotReadyError("The server is shutting down.")

    async def drain(self, deadline_s: float) -> bool:
        """Takes no more work and waits for what runs; True if all of it ended in time."""
        self.draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
