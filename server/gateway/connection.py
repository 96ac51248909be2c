"""How uvicorn serves the application, and the one thing it lacks: cutting a connection."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_EXTENSION = "linker.connection"
_GRACE_S = 5  # what open responses get once the server has drained


def server_config(app: FastAPI) -> uvicorn.Config:
    """Returns how the application is served; binding is the caller's."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        log_config=None,  # uvicorn's loggers go where ours go: stderr
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )


def cut(scope: Scope) -> bool:
    """Closes a request's connection without sending what is still buffered.

    An ordinary close waits until the client has taken the buffer, which may be never.

    Returns:
        False where the server offers no way to do it.
    """
    connection = scope.get("extensions", {}).get(_EXTENSION)
    if connection is None:
        return False
    connection["abort"]()
    return True


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose requests carry the means to cut their connection."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_EXTENSION: {"abort": self.transport.abort}}
