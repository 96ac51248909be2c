"""A connection as its answers see it: small writes joined, its closing left to its owner.

Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class HeldTransport:
    """A connection whose closing is somebody else's to decide.

    Args:
        real: The connection.
        on_close: Called instead of its `close`, with it.
    """

    def __init__(
        self, real: asyncio.Transport, on_close: Callable[[Callable[[], None]], None]
    ) -> None:
        self._real = real
        self._on_close = on_close
        self._is_closed = False
        self._head = b""
        self._loop = asyncio.get_running_loop()
        self.write: Callable[[bytes], None] = real.write  # for every piece of every answer

    def expect_head(self) -> None:
        """Keeps what is written next for a moment, to be sent together with what follows it."""
        self.flush()
        self.write = self._keep

    def flush(self) -> None:
        """Sends what was kept."""
        if self._head:
            self._write_on(b"")

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.flush()
            self._on_close(self._real.close)

    def write_eof(self) -> None:
        self.flush()
        self._real.write_eof()

    def get_write_buffer_size(self) -> int:
        return len(self._head) + self._real.get_write_buffer_size()

    def _keep(self, data: bytes) -> None:
        self._head = data
        self.write = self._write_on
        self._loop.call_soon(self.flush)

    def _write_on(self, data: bytes) -> None:
        data, self._head = self._head + data, b""
        self.write = self._real.write
        self.write(data)

    def is_closing(self) -> bool:
        return self._is_closed or self._real.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
