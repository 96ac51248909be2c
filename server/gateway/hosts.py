"""Which names a request may call the server by: a page elsewhere must not reach a loopback server.

A browser sends the name that its page was loaded under, even where that name has come to mean
127.0.0.1 since (DNS rebinding). So a server on the loopback answers to the loopback's names alone.
A page may also call it by its true name: it cannot read the answer then, but could have had a model
onboarded. Browsers say in `Origin` where such a request comes from, and so do desktop programs that
are made of pages; those are on this machine as every other program.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

from linker_core.errors import InvalidRequestError, LinkerError, PermissionDeniedError
from server.gateway.errors import error_response
from server.metrics.serving import ServingMetrics

# Where desktop programs have their pages, and no site can have one. Of `null` and `file://` that is
# not so: they are also what browsers say of a sandboxed frame, or of a page that was downloaded.
_PROGRAM = re.compile(rb"(?:app|tauri|vscode-webview)://[^\s,]*")
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?")


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine and nobody beyond it."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class HostGuard:
    """ASGI middleware: refuses requests for other names than the server's.

    Args:
        app: What is guarded.
        bound: Where the server listens. Beyond the loopback every name is taken unless some are
            named.
        allowed: Names beside the loopback's own, without ports.
        metrics: Counts refusals.
    """

    def __init__(
        self, app: ASGIApp, *, bound: str, allowed: Collection[str], metrics: ServingMetrics
    ) -> None:
        self._app = app
        self._any = not allowed and not is_loopback(bound)
        self._allowed = frozenset(name.lower().strip("[]") for name in allowed)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except LinkerError as error:
                self._metrics.rejected(error.code)
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Refuses a request that names another host, or that could be read two ways.

        Raises:
            InvalidRequestError: No name, several, or none that could be one.
            PermissionDeniedError: Another name, or a page from elsewhere.
        """
        for header, value in scope["headers"]:
            if header == b"origin" and not self._may_call(value):
                raise PermissionDeniedError(
                    "Pages of other sites may not use this server; have it started with "
                    "--allowed-host and the site's name.",
                    param="Origin",
                )
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if not hosts and scope["http_version"] == "1.0":
            return  # which had no such header; browsers have not spoken it for long
        if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
            raise InvalidRequestError("A request needs one Host header.", param="Host")
        if not self._is_ours(hosts[0]):
            raise PermissionDeniedError(
                "This server does not answer to that name; call it localhost, or have it started "
                "with --allowed-host and the name.",
                param="Host",
            )

    def _may_call(self, origin: bytes) -> bool:
        """Whether requests may come from pages of an origin."""
        if _PROGRAM.fullmatch(origin) is not None:
            return True
        return self._is_ours(origin.partition(b"://")[2])

    def _is_ours(self, host: bytes) -> bool:
        """Whether the server answers to a name, written with its port or without."""
        if self._any:
            return True
        match = _HOST.fullmatch(host)
        name = "" if match is None else match[1].decode().lower().strip("[]")
        return name in self._allowed or is_loopback(name)
