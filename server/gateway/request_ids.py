"""X-Request-Id on every answer: the client's own where it is harmless, else one made here.

What the server works with are ids of its own; this one is for people who compare two logs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
SCOPE_KEY = "linker.request_id"
_HARMLESS = re.compile(rb"[A-Za-z0-9_-]{1,64}")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Returns what a request is called in its answer; `headers` have lower-case names."""
    said = [value for name, value in headers if name == HEADER]
    if len(said) == 1 and _HARMLESS.fullmatch(said[0]):
        return said[0]
    # Nothing rests on its being secret, so the system is not asked for chance.
    return b"req-%032x" % random.getrandbits(128)


class RequestIds:
    """ASGI middleware: names requests, in `scope["linker.request_id"]` and in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope[SCOPE_KEY] = request_id_of(scope["headers"])

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
            await send(message)

        await self._app(scope, receive, send_named)
