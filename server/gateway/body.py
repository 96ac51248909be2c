"""Request bodies without trust: size, encoding, and JSON that means one thing only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from linker_core.errors import InvalidRequestError
from linker_core.weights import strict_json
from server.gateway.errors import body_limit, http_error_response
from server.metrics.serving import ServingMetrics

_MAX_INLINE_BYTES = 64 * 1024  # larger bodies are worked on in a thread
_Result = TypeVar("_Result")


class RefuseBodies:
    """ASGI middleware: compressed bodies and those that say they are too large are not read."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, metrics: ServingMetrics) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            status, more = None, ""
            if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
                status, reason = 415, "unsupported_media_type"
            elif _declared_bytes(headers.get(b"content-length", b"")) > self._max_bytes:
                status, reason = 413, "request_too_large"
                more = body_limit(self._max_bytes)
            if status is not None:
                self._metrics.rejected(reason)
                await http_error_response(status, more=more)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _declared_bytes(header: bytes) -> int:
    return int(header) if header.isdigit() else 0


async def read_object(request: Request) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InvalidRequestError: Not UTF-8, not JSON, not an object, or ambiguous: duplicate keys, NaN
            or infinite numbers, half surrogate pairs, too deep (`strict_json.MAX_DEPTH`).
    """
    return await work_on_body(request, partial(parse_object, await request.body()))


async def work_on_body(request: Request, work: Callable[[], _Result]) -> _Result:
    """Returns what work on a body that was read returns; large ones keep nobody waiting."""
    if len(await request.body()) > _MAX_INLINE_BYTES:
        return await asyncio.to_thread(work)
    return work()


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses a JSON object; see `read_object`."""
    try:
        value = strict_json.parse(body)
    except ValueError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error!s:.200}.") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    return value
