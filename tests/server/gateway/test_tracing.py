"""What the middleware notes of requests, with applications that misbehave as ours should not."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.gateway.request_ids import RequestIds
from server.gateway.tracing import Traced
from server.tracing.attributes import error_of, is_our_fault
from server.tracing.request import RequestTrace


class Notes:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.traces: list[RequestTrace] = []

    def write(self, trace: RequestTrace) -> None:
        self.traces.append(trace)

    async def close(self, *, within_s: float) -> None:
        raise AssertionError(within_s)


SCOPE: Scope = {
    "type": "http", "method": "GET", "path": "/x", "scheme": "http", "http_version": "1.1",
    "headers": [],
}  # fmt: skip


def noted(app: ASGIApp, scope: Scope = SCOPE) -> tuple[list[RequestTrace], list[Message]]:
    """Returns what is noted of one request, and what its client got."""
    notes, sent = Notes(), []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    asyncio.run(Traced(RequestIds(app), writer=notes)(dict(scope), receive, send))
    return notes.traces, sent


def answering(status: int, *bodies: bytes) -> ASGIApp:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


@pytest.mark.parametrize(
    ("status", "body", "error", "is_ours"),
    [
        (200, b'{"error":{"code":"x"}}', None, False),
        (307, b"", None, False),
        (404, b'{"error":{"code":"model_not_found"}}', "model_not_found", False),
        (503, b'{"error":{"code":"not_ready"}}', "not_ready", True),
        (400, b"", "400", False),
        (400, b"{", "400", False),
        (400, b'{"error":{"code":null}}', "400", False),
        (500, b"[]", "500", True),
    ],
)
def test_error_is_what_the_client_is_told(
    status: int, body: bytes, error: str | None, is_ours: bool
) -> None:
    [trace], sent = noted(answering(status, body))
    assert (trace.status, error_of(trace), is_our_fault(trace)) == (status, error, is_ours)
    assert sent[1]["body"] == body


def test_fault_that_nobody_caught_is_noted_and_goes_on() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError("a text that says too much")

    notes = Notes()
    with pytest.raises(ZeroDivisionError):
        asyncio.run(_run(Traced(RequestIds(app), writer=notes)))
    [trace] = notes.traces
    assert (trace.status, error_of(trace), is_our_fault(trace)) == (500, "ZeroDivisionError", True)


def test_request_that_is_cancelled_is_noted_without_an_answer() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise asyncio.CancelledError

    notes = Notes()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(_run(Traced(RequestIds(app), writer=notes)))
    [trace] = notes.traces
    assert (trace.status, error_of(trace)) == (None, None)


def test_what_is_no_request_passes_by() -> None:
    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        assert scope["type"] == "lifespan"

    assert noted(app, {"type": "lifespan"}) == ([], [])


def test_path_and_headers_are_bounded() -> None:
    headers = [(b"traceparent", b"a"), (b"traceparent", b"b"), (b"tracestate", b"\xff")]
    [trace], _ = noted(answering(200), {**SCOPE, "path": "/" + "x" * 9999, "headers": headers})
    assert len(trace.path) == 256
    assert trace.traceparent is None
    assert trace.tracestate == "ÿ"


async def _run(app: ASGIApp) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_message: Message) -> None:
        pass

    await app(dict(SCOPE), receive, send)
