"""The ASGI application: routes over services, errors in one shape, bodies bounded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server.gateway.access import Access
from server.gateway.analysis import analysis_router
from server.gateway.body import RefuseBodies
from server.gateway.changes import changes_router
from server.gateway.chat import chat_router
from server.gateway.completions import completions_router
from server.gateway.errors import install_error_handlers
from server.gateway.events import events_router
from server.gateway.hosts import HostGuard
from server.gateway.listing import listing_router
from server.gateway.management import management_router
from server.gateway.openapi import describe_bodies
from server.gateway.pages import pages_router
from server.gateway.prefix import ModelPrefix
from server.gateway.probes import probes_router
from server.gateway.request_ids import RequestIds
from server.gateway.scoring import scoring_router
from server.gateway.services import Services
from server.gateway.streaming import ClientLeftError
from server.gateway.tokenization import tokenization_router
from server.gateway.tracing import Traced

# What clients ask for all the time; it goes past FastAPI, whose part in it is to describe it.
_DIRECT_ROUTERS = (chat_router, completions_router)
# In this order: a path of many parts takes what the ones before it do not.
_ROUTERS = (
    tokenization_router, listing_router, events_router,
    management_router, changes_router, scoring_router, probes_router,
    analysis_router, pages_router,
)  # fmt: skip


def create_app(services: Services) -> FastAPI:
    """Builds the application; starting and stopping the services is the caller's."""
    app = FastAPI(
        title="LinkerLLM",
        version=version("linker-llm"),
        docs_url=None,  # its page loads scripts from elsewhere; /openapi.json stands alone
        redoc_url=None,
        redirect_slashes=False,
        # Its own spans would hold addresses, queries and what is wrong with requests.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    routes = list(app.routes)
    for parts in (*_DIRECT_ROUTERS, *_ROUTERS):
        router = parts(services)
        if parts in _DIRECT_ROUTERS:
            app.router.routes += _direct(router)
        app.include_router(router)
        routes += router.routes
    most = services.settings.http.max_body_bytes
    install_error_handlers(app, services.metrics, routes=routes, max_body_bytes=most)
    describe_bodies(app)
    app.add_exception_handler(ClientLeftError, _on_client_left)
    app.add_exception_handler(ClientDisconnect, _on_client_left)  # before its body was complete
    _guard(app, services)
    return app


class _Direct:
    """The application of an endpoint that reads its request itself, and returns a response."""

    def __init__(self, route: APIRoute) -> None:
        self._route = route
        self._endpoint: Callable[[Request], Awaitable[Response]] = route.endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self._route  # as FastAPI's own routes say it
        response = await self._endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def _direct(router: APIRouter) -> list[Route]:
    """Returns a router's routes without what FastAPI does for parameters and results."""
    return [
        Route(route.path, _Direct(route), methods=route.methods, include_in_schema=False)
        for route in router.routes
        if isinstance(route, APIRoute)
    ]


def _guard(app: FastAPI, services: Services) -> None:
    """Adds what requests pass before they reach a route; the first to see them comes last."""
    http, metrics = services.settings.http, services.metrics
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=http.max_body_bytes)
    app.add_middleware(RefuseBodies, max_bytes=http.max_body_bytes, metrics=metrics)
    app.add_middleware(Access, keys=services.keys, quotas=services.gate.quotas, metrics=metrics)
    app.add_middleware(ModelPrefix)
    app.add_middleware(HostGuard, bound=http.host, allowed=http.allowed_hosts, metrics=metrics)
    app.add_middleware(RequestIds)
    if services.spans is not None:
        app.add_middleware(Traced, writer=services.spans)


async def _on_client_left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # for middleware only: nobody reads it
