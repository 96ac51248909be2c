"""Request bodies without trust: size, encoding, and JSON that means one thing only."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from linker_core.errors import InvalidRequest
from server.gateway.errors import http_error_response
from server.metrics.serving import ServingMetrics

MAX_DEPTH = 64
_MAX_INLINE_BYTES = 64 * 1024  # larger bodies are parsed in a thread


class RefuseBodies:
    """ASGI middleware: compressed bodies and those that say they are too large are not read."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, metrics: ServingMetrics) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            status = None
            if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
                status, reason = 415, "unsupported_media_type"
            elif _declared_bytes(headers.get(b"content-length", b"")) > self._max_bytes:
                status, reason = 413, "request_too_large"
            if status is not None:
                self._metrics.rejected(reason)
                await http_error_response(status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _declared_bytes(header: bytes) -> int:
    return int(header) if header.isdigit() else 0


async def read_object(request: Request) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InvalidRequest: Not UTF-8, not JSON, not an object, or ambiguous: duplicate keys, NaN or
            infinite numbers, half surrogate pairs, deeper than `MAX_DEPTH`.
    """
    body = await request.body()
    if len(body) > _MAX_INLINE_BYTES:
        return await asyncio.to_thread(parse_object, body)
    return parse_object(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses a JSON object; see `read_object`."""
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # an integer of thousands of digits
        raise InvalidRequest("The body holds a number that is too long.") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    _check_values(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise InvalidRequest("The body holds an object with the same key twice.")
    return record


def _refuse_constant(_name: str) -> NoReturn:
    raise InvalidRequest("NaN and Infinity are not JSON.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest("The body holds a number out of range.")
    return value


def _check_values(value: Any) -> None:
    """Walks the tree level by level, so that its depth costs no stack."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        deeper: list[Any] = []
        for container in level:
            items = [*container, *container.values()] if isinstance(container, dict) else container
            for item in items:
                if isinstance(item, str):
                    _check_text(item)
                elif isinstance(item, dict | list):
                    deeper.append(item)
        level = deeper


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"A text holds half of a surrogate pair at character {error.start}; "
            "send whole characters."
        ) from error


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The body is nested deeper than {MAX_DEPTH} levels.")
