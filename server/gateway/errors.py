"""One table from errors to HTTP: status, type and headers, in OpenAI's shape."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from linker_core.errors import (
    BadCheckpointError,
    BudgetExceededError,
    ConflictError,
    ContextLengthError,
    DeadlineError,
    EngineFailureError,
    ForbiddenSourceError,
    InsufficientCapacityError,
    InvalidKeyError,
    InvalidRequestError,
    JobCancelledError,
    JobNotFoundError,
    LinkerError,
    ModelNotFoundError,
    NotReadyError,
    NumericalError,
    PermissionDeniedError,
    QueueFullError,
    RateLimitError,
    UnsupportedFormatError,
    UnusableModelError,
)
from server.gateway.request_ids import HEADER, SCOPE_KEY
from server.gateway.schemas.parsing import said
from server.metrics.serving import ServingMetrics

logger = logging.getLogger(__name__)

_MAX_RETRY_AFTER = 120  # seconds; clients give up above that
_RETRY_AFTER = {429: "1", 503: "2", 504: "2"}  # where the error does not say
_STATUS: dict[type[LinkerError], tuple[int, str]] = {
    InvalidRequestError: (400, "invalid_request_error"),
    ContextLengthError: (400, "invalid_request_error"),
    BadCheckpointError: (400, "invalid_request_error"),
    UnsupportedFormatError: (400, "invalid_request_error"),
    BudgetExceededError: (400, "invalid_request_error"),
    InvalidKeyError: (401, "authentication_error"),
    PermissionDeniedError: (403, "permission_error"),
    ForbiddenSourceError: (403, "permission_error"),
    ModelNotFoundError: (404, "not_found_error"),
    JobNotFoundError: (404, "not_found_error"),
    ConflictError: (409, "conflict_error"),
    JobCancelledError: (409, "conflict_error"),
    RateLimitError: (429, "rate_limit_error"),
    QueueFullError: (429, "rate_limit_error"),
    NotReadyError: (503, "service_unavailable_error"),
    EngineFailureError: (503, "service_unavailable_error"),
    NumericalError: (500, "server_error"),
    UnusableModelError: (500, "server_error"),
    DeadlineError: (504, "timeout_error"),
    InsufficientCapacityError: (507, "insufficient_capacity_error"),
}
_HTTP_CODES = {
    400: ("invalid_request_error", "invalid_request_error", "This is no HTTP/1.1 request."),
    404: ("not_found", "not_found_error", "There is nothing at this path."),
    405: ("method_not_allowed", "invalid_request_error", "This path does not take this method."),
    408: (
        "request_timeout",
        "timeout_error",
        "The request did not arrive in time, and the connection is closed.",
    ),
    413: ("request_too_large", "invalid_request_error", "The request body is too large."),
    415: (
        "unsupported_media_type",
        "invalid_request_error",
        "Compressed request bodies are not read; send plain JSON.",
    ),
    414: ("uri_too_long", "invalid_request_error", "The request's path is too long."),
    429: ("too_many_connections", "rate_limit_error", "Too many connections from this address."),
    431: ("headers_too_large", "invalid_request_error", "The request's headers are too large."),
    503: (
        "too_many_connections",
        "service_unavailable_error",
        "There are too many connections.",
    ),
}
_INSTEAD = {  # of routes that clients of others look for
    "/v1/responses": "Ask POST /v1/chat/completions instead. ",
    "/v1/embeddings": "The models here write text and give no embeddings. ",
}
REJECTION_REASONS = tuple(
    sorted({kind.code for kind in _STATUS} | {code for code, _, _ in _HTTP_CODES.values()})
)


def error_body(error: LinkerError) -> dict[str, object]:
    """Returns an error as clients read it, in a body or in a stream."""
    _, kind = _STATUS.get(type(error), (500, "server_error"))
    return _shape(error.message, kind, error.param, error.code)


def our_fault_body() -> dict[str, object]:
    """Returns the error that says a fault is the server's own, and nothing of its insides."""
    message = "The server failed on this request through a fault of its own."
    return _shape(message, "server_error", None, "internal_error")


def error_response(error: LinkerError) -> JSONResponse:
    """Returns an error as a response."""
    status, _ = _STATUS.get(type(error), (500, "server_error"))
    response = _response(status, error_body(error))
    if error.retry_after_s is not None:
        seconds = min(max(1, math.ceil(error.retry_after_s)), _MAX_RETRY_AFTER)
        response.headers["Retry-After"] = str(seconds)
    return response


def http_error_code(status: int) -> str:
    """Returns the code of an error that HTTP itself defines."""
    return _HTTP_CODES.get(status, ("other",))[0]


def http_error_response(
    status: int, headers: Mapping[str, str] | None = None, *, more: str = ""
) -> JSONResponse:
    """Returns an error that HTTP itself defines, such as 405; `more` says what is to be done."""
    code, kind, message = _HTTP_CODES.get(
        status, ("invalid_request_error", "invalid_request_error", HTTPStatus(status).phrase)
    )
    return _response(status, _shape(f"{message} {more}".rstrip(), kind, None, code), headers)


def body_limit(max_bytes: int) -> str:
    """Returns what a client is told whose body is too large."""
    return f"At most {max_bytes} bytes are taken."


def install_error_handlers(
    app: FastAPI, metrics: ServingMetrics, *, routes: Sequence[BaseRoute], max_body_bytes: int
) -> None:
    """Makes every failure of one of the routes, or beside them, an error in OpenAI's shape."""

    async def on_linker_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, LinkerError)
        metrics.rejected(error.code)
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers, more = dict(error.headers or {}), ""
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(sorted(_methods(routes, request)))
            more = f"It takes {headers['Allow']}."
        elif error.status_code == HTTPStatus.NOT_FOUND:
            instead = _INSTEAD.get(request.scope["path"], "")
            more = f"{instead}GET /openapi.json describes every path."
        elif error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            more = body_limit(max_body_bytes)
        response = http_error_response(error.status_code, headers, more=more)
        metrics.rejected(http_error_code(error.status_code))
        return response

    async def on_bad_query(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = str(first["loc"][1])  # after where it was, and before its place in a list
        metrics.rejected(InvalidRequestError.code)
        return error_response(InvalidRequestError(f"{param}: {said(first)}.", param=param))

    async def on_our_fault(request: Request, _error: Exception) -> JSONResponse:
        # uvicorn hangs up after it; a client that is not told would send its next request there.
        response = _response(500, our_fault_body(), {"Connection": "close"})
        if SCOPE_KEY in request.scope:  # answered outside of what names the others
            response.raw_headers.append((HEADER, request.scope[SCOPE_KEY]))
        return response

    app.add_exception_handler(LinkerError, on_linker_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_bad_query)
    app.add_exception_handler(Exception, on_our_fault)


def _methods(routes: Sequence[BaseRoute], request: Request) -> set[str]:
    """Returns what a path takes. The router's own answer knows one of its routes only."""
    return {
        method
        for route in routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }


def _shape(message: str, kind: str, param: str | None, code: str) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _response(
    status: int, body: dict[str, object], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    response = JSONResponse(body, status_code=status, headers=headers)
    if status in _RETRY_AFTER:
        response.headers["Retry-After"] = _RETRY_AFTER[status]
    if status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if status == HTTPStatus.CONFLICT:
        response.headers["x-should-retry"] = "false"  # the SDK would repeat a 409
    return response
