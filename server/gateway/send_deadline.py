"""How long a client may leave what is sent to it unread. Knows no protocol."""

from __future__ import annotations

import asyncio
import logging

logger = logging.getLogger(__name__)

_LEAST_PROGRESS = 16 * 1024  # bytes that a client has to take in the time it has


class SendDeadline:
    """Cuts a connection off whose buffer does not empty. Event loop only.

    Args:
        loop: The connection's.
        transport: What is aborted.
        timeout_s: What a client has for some progress.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, timeout_s: float
    ) -> None:
        self._loop, self._transport, self._timeout_s = loop, transport, timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0

    def set(self) -> None:
        """Gives the client time to take what is buffered: an ordinary close waits for ever."""
        self._unsent_bytes = self._transport.get_write_buffer_size()
        if self._unsent_bytes and self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._on_unread)

    def lift(self) -> None:
        """Forgets the deadline: the client has read, or is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_unread(self) -> None:
        self._timer = None
        before = self._unsent_bytes
        unsent = self._transport.get_write_buffer_size()
        if 0 < unsent <= before - _LEAST_PROGRESS:
            self.set()
        elif unsent:
            logger.warning("an answer was not read for %g s; cut off", self._timeout_s)
            self._transport.abort()
