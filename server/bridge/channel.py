"""Messages to and from another process without a thread that waits for them. Event loop only.

The other end is a `multiprocessing.connection.Connection`, which sends and receives as ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import struct
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final

logger = logging.getLogger(__name__)

# At once, so that whatever else the loop has to do waits for a few milliseconds at most.
_READ_BYTES: Final = 64 * 1024
# A message comes after its length: four bytes, or these four and then eight.
_LENGTH: Final = struct.Struct("!i")
_LONG: Final = _LENGTH.pack(-1)
_LONG_LENGTH: Final = struct.Struct("!Q")
_MAX_LENGTH: Final = 2**31 - 1


class Channel:
    """One end of a connection, whose messages are handed over as they come.

    Args:
        connection: This end, which the channel owns from here on.
        on_message: Called with each message.
        on_closed: Called once, when the other end is gone; the connection is closed by then.
    """

    def __init__(
        self,
        connection: Connection[object, object],
        *,
        on_message: Callable[[object], None],
        on_closed: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._on_message = on_message
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._descriptor = connection.fileno()
        self._unread = bytearray()  # the beginning of a message
        self._unsent: deque[memoryview] = deque()
        self._is_broken = False  # nothing that is sent arrives any more
        os.set_blocking(self._descriptor, False)
        self._loop.add_reader(self._descriptor, self._read)

    def send(self, message: object) -> None:
        """Sends a message, as soon as the other end takes it; to one that is gone, nothing.

        Never waits: what the other end has not taken is kept here.
        """
        if self._is_broken:
            return
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        length = len(data)
        if length > _MAX_LENGTH:
            head = _LONG + _LONG_LENGTH.pack(length)
        else:
            head = _LENGTH.pack(length)
        self._unsent.append(memoryview(head + data))
        if len(self._unsent) == 1:
            self._write()
            if self._unsent:
                self._loop.add_writer(self._descriptor, self._write_on)

    def _write_on(self) -> None:
        self._write()
        if not self._unsent:
            self._loop.remove_writer(self._descriptor)

    def _write(self) -> None:
        try:
            while self._unsent:
                first = self._unsent[0]
                num_sent = os.write(self._descriptor, first)
                if num_sent < len(first):
                    self._unsent[0] = first[num_sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._is_broken = True  # the reader sees the closed connection and says so
            self._unsent.clear()

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        self._unread += data
        self._hand_over()

    def _hand_over(self) -> None:
        """Hands over every message that is complete, in order."""
        unread, start = self._unread, 0
        while (bounds := _bounds(unread, start)) is not None:
            begin, start = bounds
            message = pickle.loads(memoryview(unread)[begin:start])
            # Each for itself: one that breaks its handler does not keep the others back.
            self._loop.call_soon(self._on_message, message)
        del unread[:start]

    def _close(self) -> None:
        self._is_broken = True
        self._unsent.clear()
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._connection.close()
        self._loop.call_soon(self._on_closed)


def _bounds(data: bytearray, start: int) -> tuple[int, int] | None:
    """Returns where the message lies whose length is at `start`; None if it is not all there."""
    begin = start + _LENGTH.size
    if len(data) < begin:
        return None
    (length,) = _LENGTH.unpack_from(data, start)
    if length == -1:
        if len(data) < begin + _LONG_LENGTH.size:
            return None
        (length,) = _LONG_LENGTH.unpack_from(data, begin)
        begin += _LONG_LENGTH.size
    end = begin + length
    return (begin, end) if end <= len(data) else None
