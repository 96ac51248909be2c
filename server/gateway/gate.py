"""How much work is taken: a bound on sequences in flight, and the drain at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from linker_core.errors import InvalidRequestError, NotReadyError, QueueFullError


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
        self.closing = asyncio.Event()  # set when no more work is taken

    @property
    def draining(self) -> bool:
        """Whether the server takes no more work."""
        return self.closing.is_set()

    @contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        """Holds places for the sequences of one request.

        Raises:
            NotReadyError: The server is shutting down.
            InvalidRequestError: More sequences than would ever be admitted.
            QueueFullError: Too many sequences are in flight.
        """
        self.check_open()
        if num_sequences > self._limit:
            raise InvalidRequestError(
                f"The request makes {num_sequences} sequences, and the server runs at most "
                f"{self._limit} at once; send fewer prompts or a smaller n."
            )
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

    def close(self) -> None:
        """Takes no more work from here on."""
        self.closing.set()

    async def drain(self, deadline_s: float) -> bool:
        """Takes no more work and waits for what runs; True if all of it ended in time."""
        self.close()
        try:
            async with asyncio.timeout(deadline_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
