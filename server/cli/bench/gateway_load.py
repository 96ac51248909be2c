"""HTTP load with next to no cost of its own: raw connections, and what each answer took.

Knows of HTTP what a well-behaved server sends: a length or chunks, events that end in a blank line.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Self, cast

from linker_core.errors import LinkerError

_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_EVENT_END = b"\n\n"
_DEADLINE_S = 120.0


@dataclass(slots=True)
class Exchange:
    """A request and how its answer came; times in seconds of `time.perf_counter`.

    Attributes:
        asked_at: When it was to be sent, though its connection may have been busy then.
        first_at: When the first bytes of the body came.
        done_at: When the last came.
        longest_gap_s: Between two arrivals of a body.
        status: As HTTP has it; 0 until it is known.
        body: Chunks included, where they are.
    """

    asked_at: float
    first_at: float = 0.0
    done_at: float = 0.0
    longest_gap_s: float = 0.0
    status: int = 0
    body: bytearray = field(default_factory=bytearray)

    @property
    def events(self) -> list[bytes]:
        """The events of a stream."""
        lines = (line for line in bytes(self.body).split(b"\n") if line.startswith(b"data: "))
        return [line + _EVENT_END for line in lines]


def request_bytes(path: str, body: Mapping[str, Any] | bytes, *, method: str = "POST") -> bytes:
    """Returns a request as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class Connection(asyncio.Protocol):
    """One connection, which sends its requests one after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[bytes, Exchange, asyncio.Future[Exchange]]] = deque()
        self._head = bytearray()
        self._left: int | None = None  # of a body whose length is known
        self._last_at = 0.0

    @classmethod
    async def open(cls, port: int) -> Self:
        """Connects to a server of this machine."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        return connection

    def close(self) -> None:
        """Leaves, whatever is on its way."""
        if self._transport is not None:
            self._transport.abort()

    def ask(self, request: bytes) -> asyncio.Future[Exchange]:
        """Sends a request once the ones before it are answered; its time runs from now on."""
        exchange = Exchange(asked_at=time.perf_counter())
        answered: asyncio.Future[Exchange] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, exchange, answered))
        if len(self._waiting) == 1:
            self._send()
        return answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._waiting:
            return  # the server says something unasked; closing follows
        exchange = self._waiting[0][1]
        if not exchange.status:
            self._head += data
            end = self._head.find(_HEAD_END)
            if end < 0:
                return
            data = bytes(self._head[end + len(_HEAD_END) :])
            self._read_head(bytes(self._head[:end]).lower(), exchange)
        if data:
            if exchange.body:
                exchange.longest_gap_s = max(exchange.longest_gap_s, now - self._last_at)
            else:
                exchange.first_at = now
            self._last_at = now
            exchange.body += data
        whole = self._left is not None and len(exchange.body) >= self._left
        if whole or (self._left is None and exchange.body.endswith(_LAST_CHUNK)):
            exchange.done_at = now
            self._finish(exchange)

    def connection_lost(self, _error: Exception | None) -> None:
        for _, exchange, answered in self._waiting:
            if not answered.done():
                exchange.done_at = time.perf_counter()
                answered.set_result(exchange)
        self._waiting.clear()

    def _send(self) -> None:
        assert self._transport is not None
        self._head.clear()
        self._transport.write(self._waiting[0][0])

    def _read_head(self, head: bytes, exchange: Exchange) -> None:
        exchange.status = int(head.split(b" ", 2)[1])
        _, found, length = head.partition(b"content-length:")
        self._left = int(length.split(b"\r\n", 1)[0]) if found else None

    def _finish(self, exchange: Exchange) -> None:
        _, _, answered = self._waiting.popleft()
        if not answered.done():
            answered.set_result(exchange)
        if self._waiting:
            self._send()


async def open_all(port: int, num_connections: int) -> list[Connection]:
    """Opens connections, one after another."""
    return [await Connection.open(port) for _ in range(num_connections)]


async def at_once(port: int, requests: Sequence[bytes]) -> list[Exchange]:
    """Sends each request on a connection of its own, all at once, and reads to the end.

    Raises:
        LinkerError: One was not answered with success.
    """
    connections = await open_all(port, len(requests))
    try:
        return await _answers(
            [each.ask(request) for each, request in zip(connections, requests, strict=True)]
        )
    finally:
        _close(connections)


async def open_loop(
    port: int, requests: Sequence[bytes], *, num_connections: int, rate: float, seed: int
) -> list[Exchange]:
    """Sends requests at random times, whatever became of the ones before them.

    Args:
        port: Of the server.
        requests: One after another.
        num_connections: Which take turns; each has carried a request before the time is taken.
        rate: Requests a second, on average; the pauses are exponentially distributed.
        seed: Of the pauses.

    Raises:
        LinkerError: One was not answered with success.
    """
    pauses = random.Random(seed)
    connections = await open_all(port, num_connections)
    try:
        await _answers([each.ask(requests[0]) for each in connections])
        asked: list[asyncio.Future[Exchange]] = []
        due_at = time.perf_counter()
        for connection, request in zip(cycle(connections), requests, strict=False):
            due_at += pauses.expovariate(rate)
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            asked.append(connection.ask(request))
        return await _answers(asked)
    finally:
        _close(connections)


def _close(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.close()


async def _answers(asked: Sequence[asyncio.Future[Exchange]]) -> list[Exchange]:
    """Waits for answers, each of which must be one of success."""
    async with asyncio.timeout(_DEADLINE_S):
        found = await asyncio.gather(*asked)
    for exchange in found:
        if exchange.status != 200:
            raise LinkerError(
                f"A request of the benchmark was answered with {exchange.status}: "
                f"{bytes(exchange.body[:300])!r}"
            )
    return found
