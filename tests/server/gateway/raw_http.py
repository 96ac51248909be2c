"""A server of a bare application, and clients that speak to it byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.cli.serve import listen
from server.gateway.connection import server_config
from server.gateway.server_config import ServerConfig
from server.settings import HttpSettings

PATIENCE_S = 30.0  # of a test; the server's own limits are far shorter
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Echo:
    """An application that answers with the body, and remembers what it was asked."""

    asked: list[Scope] = field(default_factory=list)
    left: int = 0  # clients that went before their request was complete

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            body, more = body + message["body"], message.get("more_body", False)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Site:
    """A running server."""

    port: int
    refused: list[str]
    config: ServerConfig
    server: uvicorn.Server

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Client]:
        """Opens a connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def say(self, *pieces: bytes) -> bytes:
        """Sends pieces on a connection of their own and returns all that comes until its end."""
        async with self.connection() as client:
            for piece in pieces:
                await client.send(piece)
            return await client.rest()


@dataclass
class Client:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Sends; a connection that was cut takes nothing more."""
        self.writer.write(data)
        with contextlib.suppress(OSError):
            await self.writer.drain()

    async def trickle(self, data: Iterable[int]) -> None:
        """Sends one byte after the other, as long as they are taken."""
        for byte in data:
            if self.reader.at_eof() or self.writer.is_closing():
                return
            await self.send(bytes((byte,)))
            await asyncio.sleep(0.01)

    async def answer(self) -> tuple[int, bytes]:
        """Returns the status and the body of one answer that has a length."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        )
        return int(head.split(b" ", 2)[1]), await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Returns what comes until the connection ends, as it must, in order or not."""
        received = bytearray()
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                while chunk := await self.reader.read(65536):
                    received += chunk
        return bytes(received)


@asynccontextmanager
async def serving(app: ASGIApp, **http: Any) -> AsyncIterator[Site]:
    """Serves an application under limits until the block ends."""
    listener, refused = listen("127.0.0.1", 0), list[str]()
    config = server_config(app, HttpSettings(**http), on_refused=refused.append)
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        yield Site(listener.getsockname()[1], refused, config, server)
    finally:
        server.should_exit = True
        await task


def statuses(received: bytes) -> list[int]:
    """Returns the statuses of the answers in what came."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def error_of(received: bytes) -> dict[str, Any]:
    """Returns the error in the last answer of what came."""
    error = json.loads(received.rpartition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error
