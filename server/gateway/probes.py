"""Health, readiness, version, metrics: what machines ask a server."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server.gateway.services import Services

_EXPOSITION: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


def probes_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> JSONResponse:
        # Alive means that a restart would mend nothing; whether work gets done is readiness.
        if services.engine.is_alive:
            return JSONResponse({"status": "ok"})
        body = {"status": "dead", "reason": f"the engine is {services.engine.state.value}"}
        return JSONResponse(body, status_code=503, headers={"Retry-After": "1"})

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> JSONResponse:
        reason = services.why_not_ready()
        if reason is None:
            degraded = services.why_degraded()
            if degraded is not None:
                return JSONResponse({"status": "degraded", "reason": degraded})
            return JSONResponse({"status": "ready"})
        headers = {"Retry-After": "1"}
        body = {"status": "not_ready", "reason": reason}
        return JSONResponse(body, status_code=503, headers=headers)

    @router.head("/version", include_in_schema=False)
    @router.get("/version")
    async def get_version() -> dict[str, Any]:
        return {"version": version("linker-llm")}

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=Response, responses=_EXPOSITION)
    async def metrics() -> Response:
        return Response(await services.scrape(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
