"""Server-sent events, and waiting that ends when the client leaves. Knows no model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from linker_core.errors import LinkerError
from server.gateway.errors import error_body, error_response, our_fault_body
from server.metrics.serving import ServingMetrics

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_Result = TypeVar("_Result")


class ClientLeftError(Exception):
    """The client closed the connection before its answer was ready."""


def event(record: dict[str, Any]) -> bytes:
    """Returns one event; the text stays as it is, since clients read UTF-8."""
    return b"data: " + orjson.dumps(record) + b"\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Awaits `work`, cancelling it when the client leaves. The body must have been read.

    Raises:
        ClientLeftError: It did.
    """
    return await unless(_departure(request.receive), work, error=ClientLeftError())


async def unless(
    ending: Coroutine[Any, Any, object], work: Coroutine[Any, Any, _Result], *, error: Exception
) -> _Result:
    """Awaits `work`, cancelling it and raising `error` if `ending` comes first."""
    waiting = asyncio.current_task()
    assert waiting is not None
    num_cancels, has_ended = waiting.cancelling(), False
    # A task of its own: one that is resumed passes through all that wait for it in the same task,
    # which are two dozen where a request is answered, for every token.
    task, end = asyncio.ensure_future(work), asyncio.ensure_future(ending)

    def on_end(end: asyncio.Future[object]) -> None:
        nonlocal has_ended
        has_ended = True
        end.exception()  # retrieved: it has ended, however it did
        task.cancel()

    end.add_done_callback(on_end)
    try:
        result = await task
    except asyncio.CancelledError:
        if has_ended and waiting.cancelling() == num_cancels:
            raise error from None
        raise
    finally:
        end.remove_done_callback(on_end)
        end.cancel()
    if has_ended:  # the work would not be cancelled, or ended at the same time
        raise error
    return result


class EventStream(Response):
    """A stream of events whose response begins with the first of them.

    Until then an error is an ordinary response with its own status; afterwards it is an event,
    followed by `[DONE]`. A client that leaves closes the generator; one that takes nothing holds it
    up, until the server that sends cuts the connection.

    Args:
        events: Encoded events; what ends in `[DONE]` is the last.
        metrics: Counts refusals.
        until_sent: What is closed once the response has ended.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        metrics: ServingMetrics,
        until_sent: AsyncExitStack | None = None,
    ) -> None:
        super().__init__(status_code=200)
        self.raw_headers = list(_HEADERS)
        self._events = events
        self._metrics = metrics
        self._until_sent = until_sent or AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._until_sent:
            await self._respond(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientLeftError):
            await unless(
                _departure(receive), self._stream(scope, receive, send), error=ClientLeftError()
            )

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        async with aclosing(self._events) as events:
            try:
                async for chunk in events:
                    if not begun:
                        begun = True
                        await self._begin(send)
                    is_last = chunk.endswith(DONE)
                    await send(_body(chunk, more=not is_last))
                    if is_last:
                        return
            except LinkerError as error:
                self._metrics.rejected(error.code)
                if not begun:
                    await error_response(error)(scope, receive, send)
                    return
                await send(_body(event(error_body(error)) + DONE, more=True))
            except Exception:
                if not begun:
                    raise  # answered as any other fault of ours
                logger.exception("a stream broke through a fault of ours")
                await send(_body(event(our_fault_body()) + DONE, more=True))
            await send(_body(b"", more=False))

    async def _begin(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )


def _body(chunk: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
