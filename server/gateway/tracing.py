"""Where requests say what happened to them, if spans are written at all. Knows no OpenTelemetry."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linker_core.errors import LinkerError
from server.gateway.generation import Delta
from server.gateway.request_ids import SCOPE_KEY as REQUEST_ID
from server.gateway.schemas.chat import ChatRequest
from server.gateway.schemas.generation import GenerationRequest
from server.tracing.request import AnswerTrace, OptionValue, RequestTrace
from server.tracing.writer import SpanWriter

SCOPE_KEY = "linker.trace"
PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds, for ever
_MAX_ERROR_BYTES = 65536
_MAX_PATH_CHARS = 256
_SAID = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")


class Traced:
    """ASGI middleware: follows each request to its end and has it written.

    Args:
        app: What answers.
        writer: Who writes.
    """

    def __init__(self, app: ASGIApp, *, writer: SpanWriter) -> None:
        self._app = app
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        trace = scope[SCOPE_KEY] = _begun(scope)

        async def send_seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            elif trace.status is not None and trace.status >= 400 and trace.error is None:
                trace.error = _code_of(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        except Exception as error:
            trace.status = trace.status or 500  # which is answered outside of this
            trace.error = type(error).__name__
            raise
        finally:
            trace.ended_at = time.monotonic()
            trace.request_id = scope[REQUEST_ID].decode()
            trace.route = getattr(scope.get("route"), "path", None)
            self._writer.write(trace)


def begin_answer(
    http_request: Request, request: GenerationRequest, *, model: str, response_id: str
) -> AnswerTrace | None:
    """Returns what is to be filled in of an answer, None where nobody wants to know.

    Args:
        http_request: Which it answers.
        request: The checked body.
        model: Who answers.
        response_id: What the answer is called.
    """
    trace: RequestTrace | None = http_request.scope.get(SCOPE_KEY)
    if trace is None:
        return None
    trace.answer = AnswerTrace(
        operation="chat" if isinstance(request, ChatRequest) else "text_completion",
        asked_model=request.model,
        model=model,
        response_id=response_id,
        options=_options(request),
    )
    return trace.answer


async def followed(
    pieces: AsyncGenerator[list[Delta], None],
    trace: AnswerTrace,
    *,
    usage: Callable[[int], Mapping[str, Any]],
) -> AsyncGenerator[list[Delta], None]:
    """Passes the pieces of an answer on, and notes when they come and how they end.

    Args:
        pieces: As `generate` yields them.
        trace: What is filled in.
        usage: Returns what the client is told of the tokens, for as many as were answered.
    """
    num_tokens = 0
    submitted_at = trace.submitted_at = time.monotonic()
    try:
        async with aclosing(pieces):
            async for deltas in pieces:
                trace.last_token_at = time.monotonic()
                if trace.first_token_at is None:
                    trace.first_token_at = trace.last_token_at
                    if (queued_s := deltas[0].token.queued_s) is not None:
                        trace.begun_at = submitted_at + queued_s
                num_tokens += sum(delta.is_answer for delta in deltas)
                if (reason := deltas[-1].finish_reason) is not None:
                    trace.finish_reasons[deltas[-1].index] = reason.value
                yield deltas
    except LinkerError as error:
        trace.error = error.code
        raise
    except Exception as error:
        trace.error = type(error).__name__
        raise
    finally:
        told = usage(num_tokens)
        trace.usage = {
            "input_tokens": told["prompt_tokens"],
            "output_tokens": told["completion_tokens"],
            "cached_tokens": told["prompt_tokens_details"]["cached_tokens"],
        }


def _begun(scope: Scope) -> RequestTrace:
    return RequestTrace(
        method=scope["method"],
        path=scope["path"][:_MAX_PATH_CHARS],
        scheme=scope["scheme"],
        http_version=scope["http_version"],
        traceparent=_only(scope, b"traceparent"),
        tracestate=_only(scope, b"tracestate"),
        arrived_ns=time.time_ns(),
        arrived_at=time.monotonic(),
    )


def _only(scope: Scope, name: bytes) -> str | None:
    """Returns a header that was sent once, None of one that was not or more often."""
    said = [value for header, value in scope["headers"] if header == name]
    return said[0].decode("latin-1") if len(said) == 1 else None


def _code_of(body: bytes) -> str | None:
    """Returns the code of the error that a client is told."""
    try:
        said = orjson.loads(body[:_MAX_ERROR_BYTES])
    except orjson.JSONDecodeError:
        return None
    match said:
        case {"error": {"code": str() as code}}:
            return code
    return None


def _options(request: GenerationRequest) -> Mapping[str, OptionValue]:
    """Returns what a request says of how it is to be answered, as far as it says it."""
    limit = request.max_tokens
    if isinstance(request, ChatRequest):
        limit = request.max_completion_tokens or limit
    asked_format = request.response_format
    said: dict[str, OptionValue | None] = {name: getattr(request, name) for name in _SAID}
    said["max_tokens"] = limit
    said["n"] = None if request.n == 1 else request.n
    said["stream"] = request.stream or None
    said["variant_mode"] = request.variant_mode
    if asked_format is not None:
        said["output_type"] = "text" if asked_format.type == "text" else "json"
    return {name: value for name, value in said.items() if value is not None}
