"""What answers cost without a gateway: `… CORE PORT ANSWERS KIND`, the same bytes from one core.

ANSWERS is a JSON file: `whole`, a body, and `events`, those of a stream. KIND is `tcp`, a loop that
parses nothing and writes each answer at once, or `uvicorn`, an application that knows no route.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.cli.serve import listen

_STREAMED = b'"stream":true'
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


class _Tcp(asyncio.Protocol):
    """Answers whatever arrives; requests are small enough to come in one piece."""

    def __init__(self, whole: bytes, events: list[bytes]) -> None:
        self._whole = _HEAD + b"content-length: %d\r\n\r\n%s" % (len(whole), whole)
        chunks = [b"%x\r\n%s\r\n" % (len(each), each) for each in events]
        self._stream = _HEAD + b"transfer-encoding: chunked\r\n\r\n%s0\r\n\r\n" % b"".join(chunks)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._stream if _STREAMED in data else self._whole)


def _app(whole: bytes, events: list[bytes]) -> ASGIApp:
    json_header = [(b"content-type", b"application/json")]

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        is_stream = _STREAMED in body
        length = [] if is_stream else [(b"content-length", b"%d" % len(whole))]
        headers = json_header + length
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in events if is_stream else ():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        last = b"" if is_stream else whole
        await send({"type": "http.response.body", "body": last, "more_body": False})

    return app


async def _serve(kind: str, port: int, whole: bytes, events: list[bytes]) -> None:
    listener = listen("127.0.0.1", port)
    if kind == "uvicorn":
        config = uvicorn.Config(
            _app(whole, events),
            http="httptools",
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
        )
        await uvicorn.Server(config).serve(sockets=[listener])
        return
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Tcp(whole, events), sock=listener)
    await server.serve_forever()


def main() -> None:
    """Answers until it is ended."""
    core, port, answers, kind = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    given = json.loads(Path(answers).read_text())
    events = [event.encode() for event in given["events"]]
    asyncio.run(_serve(kind, int(port), given["whole"].encode(), events))


if __name__ == "__main__":
    main()
