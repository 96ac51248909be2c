"""Requests that name their model in the path: `/m/{id}/…` is the route without it, for one model.

Some clients know a base URL and nothing else; so every model has one of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from linker_core.errors import InvalidRequestError
from server.gateway.services import Services

SCOPE_MODEL: Final = "linker.model"
# An id holds one slash at most. The rest never begins as a prefix does, so nothing is left to be
# rewritten once more.
_PREFIXED: Final = re.compile(
    r"/m/(?P<model>[^/]+(?:/[^/]+)?)(?P<rest>/(?:v1/.*|tokenize|detokenize|tokenizer_info))",
    re.DOTALL,
)


class ModelPrefix:
    """ASGI middleware: takes the model out of the path, before anything is decided by a path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            match = _PREFIXED.fullmatch(scope["path"])
            if match is not None:
                scope[SCOPE_MODEL] = match["model"]
                scope["path"] = match["rest"]
                scope["raw_path"] = quote(match["rest"]).encode()
        await self._app(scope, receive, send)


def prefix_model(request: Request) -> str | None:
    """Returns the model that a request's path names, if it names one."""
    model: str | None = request.scope.get(SCOPE_MODEL)
    return model


def addressed(request: Request, body: dict[str, Any], services: Services) -> dict[str, Any]:
    """Returns a body with the model that its path names, if it names one.

    Raises:
        ModelNotFoundError: There is no such model.
        InvalidRequestError: The body names another one.
    """
    model = prefix_model(request)
    if model is None:
        return body
    record = services.roster.named(model)
    _check_same(body, {record.name, *filter(None, (record.alias,))})
    return {**body, "model": model}


def _check_same(body: Mapping[str, Any], names: set[str]) -> None:
    said = body.get("model")
    if said is not None and not (isinstance(said, str) and said in names):
        raise InvalidRequestError(
            "The body names another model than the path. Leave one of them out.", param="model"
        )
