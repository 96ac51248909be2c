"""uvicorn's settings for one server, and what all of its connections share. Knows no protocol."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from server.gateway.peers import Peers
from server.settings import HttpSettings

_GRACE_S = 5  # what open responses get once the server has drained
_RESERVED_FILES = 256  # descriptors that are not for connections


class ServerConfig(uvicorn.Config):
    """uvicorn's settings and, for all connections of one server, ours.

    Args:
        app: What is served.
        protocol: What speaks with one connection, made by uvicorn.
        http: Limits.
        on_refused: Hears the code of what was refused before it reached the application.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        protocol: type[asyncio.Protocol],
        http: HttpSettings,
        on_refused: Callable[[str], None],
    ) -> None:
        super().__init__(
            app,
            http=protocol,
            ws="none",
            log_config=None,  # uvicorn's loggers go where ours go: stderr
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,  # nothing here believes what clients say of their addresses
            timeout_graceful_shutdown=_GRACE_S,
        )
        self.limits = http
        self.on_refused = on_refused
        self.is_winding_down = False  # answers then end their connections
        self.peers = Peers(
            limit=min(http.max_connections, _files_for_connections()),
            limit_each=http.max_connections_per_address,
        )


def _files_for_connections() -> int:
    """Returns how many connections there are descriptors for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return 2**31
    return files - min(_RESERVED_FILES, files // 2)
