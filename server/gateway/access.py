"""Who may do what: every route's audience, and the key that each request has to show for it.

A path is judged as the router will see it, after every rewriting. What nobody has classified is the
operators', so a new route is never open by forgetting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

from starlette.datastructures import Headers
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from linker_core.errors import LinkerError, PermissionDeniedError
from server.gateway.caller import EVERYBODY, SCOPE_KEY, STRANGER, Caller
from server.gateway.errors import error_response
from server.gateway.keys import KeyRing
from server.gateway.limits import Quotas
from server.metrics.serving import ServingMetrics
from server.registry.records import Role


class Audience(Enum):
    """Whom a route is for; the value says whose keys open it, None that it takes no key."""

    ANYONE = None
    VISITORS = frozenset(Role)  # or nobody's key; what they find out is which of them they are
    CLIENTS = frozenset({Role.CLIENT, Role.ADMIN})
    WATCHERS = frozenset({Role.METRICS, Role.ADMIN})  # who look on and change nothing
    OPERATORS = frozenset({Role.ADMIN})


# Every route of the application, by path and method, in the order in which the router tries them.
AUDIENCES: Mapping[str, Mapping[str, Audience]] = {
    "/": {"GET": Audience.ANYONE, "HEAD": Audience.ANYONE},
    "/health": {"GET": Audience.ANYONE, "HEAD": Audience.ANYONE},
    "/ready": {"GET": Audience.ANYONE, "HEAD": Audience.ANYONE},
    "/ui": {"GET": Audience.ANYONE, "HEAD": Audience.ANYONE},
    "/ui/session": {"GET": Audience.VISITORS},
    "/ui/{file}": {"GET": Audience.ANYONE, "HEAD": Audience.ANYONE},
    "/metrics": {"GET": Audience.WATCHERS, "HEAD": Audience.WATCHERS},
    "/version": {"GET": Audience.CLIENTS, "HEAD": Audience.CLIENTS},
    "/openapi.json": {"GET": Audience.CLIENTS, "HEAD": Audience.CLIENTS},
    "/v1/chat/completions": {"POST": Audience.CLIENTS},
    "/v1/completions": {"POST": Audience.CLIENTS},
    "/tokenize": {"POST": Audience.CLIENTS},
    "/detokenize": {"POST": Audience.CLIENTS},
    "/tokenizer_info": {"GET": Audience.CLIENTS},
    "/v1/models": {"GET": Audience.CLIENTS},
    "/v1/models/{name:path}": {"GET": Audience.CLIENTS, "DELETE": Audience.OPERATORS},
    "/models": {"GET": Audience.WATCHERS, "POST": Audience.OPERATORS},
    "/models/plan": {"POST": Audience.OPERATORS},
    "/models/load": {"POST": Audience.OPERATORS},
    "/models/scores": {"POST": Audience.OPERATORS},
    "/models/unload": {"POST": Audience.OPERATORS},
    "/models/events": {"GET": Audience.WATCHERS},
    "/models/jobs": {"GET": Audience.WATCHERS},
    "/models/jobs/{job_id}": {"GET": Audience.WATCHERS},
    "/models/jobs/{job_id}/cancel": {"POST": Audience.OPERATORS},
    "/models/{name:path}": {
        "GET": Audience.WATCHERS,
        "PATCH": Audience.OPERATORS,
        "DELETE": Audience.OPERATORS,
    },
    "/analysis": {"GET": Audience.WATCHERS},
    "/analysis/{family:path}": {"GET": Audience.WATCHERS},
}
# As the router itself matches them.
_PATTERNS = [
    (compile_path(template)[0], methods)
    for template, methods in AUDIENCES.items()
    if "{" in template
]
_STRICTEST = (
    Audience.OPERATORS, Audience.WATCHERS, Audience.CLIENTS, Audience.VISITORS, Audience.ANYONE,
)  # fmt: skip
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)


def audience_of(method: str, path: str) -> Audience:
    """Returns whom a request's path and method are for.

    It is the audience of the route that will run: the first whose path fits and that takes the
    method. A method that none of them takes runs nothing, so it needs what the strictest of them
    needs; an unknown path needs an operator's key.
    """
    exact = AUDIENCES.get(path, {})
    if method in exact:
        return exact[method]
    fitting = [exact, *(methods for pattern, methods in _PATTERNS if pattern.match(path))]
    audiences = {audience for methods in fitting for audience in methods.values()}
    for methods in fitting:
        if method in methods:
            return methods[method]
    return next((a for a in _STRICTEST if a in audiences), Audience.OPERATORS)


class Access:
    """ASGI middleware: finds out whose request it is before its body is read.

    Args:
        app: What is guarded.
        keys: Those that are good.
        quotas: What they have used.
        metrics: Counts refusals.
    """

    def __init__(
        self, app: ASGIApp, *, keys: KeyRing, quotas: Quotas, metrics: ServingMetrics
    ) -> None:
        self._app = app
        self._keys = keys
        self._quotas = quotas
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope[SCOPE_KEY] = self._caller(scope)
            except LinkerError as error:
                self._metrics.rejected(error.code)
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        """Returns whose request it is, and counts it.

        Raises:
            InvalidKeyError: No key, or none that is good.
            PermissionDeniedError: A key of another role.
            RateLimitError: A key that has used up its minute.
        """
        if self._keys.are_optional:
            return EVERYBODY
        audience = audience_of(scope["method"], scope["path"])
        if audience is Audience.ANYONE:
            return STRANGER
        if audience is Audience.VISITORS and "Authorization" not in Headers(scope=scope):
            return STRANGER
        caller = self._keys.find(_presented(scope))
        self._quotas.count_request(caller)
        if caller.role not in audience.value:
            roles = " or ".join(sorted(role.value for role in audience.value))
            raise PermissionDeniedError(
                f"This needs a key of role {roles}, and yours is of role {caller.role.value}; "
                "`linker keys create NAME --role ROLE` makes one."
            )
        return caller


def _presented(scope: Scope) -> str | None:
    """Returns the key of a request, None without one that could be one."""
    said = Headers(scope=scope).getlist("Authorization")
    match = _BEARER.fullmatch(said[0].strip()) if len(said) == 1 else None
    return None if match is None else match[1]
