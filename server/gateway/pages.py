"""GET /ui: the page and its files, which hold no data, and who the page's key makes its reader."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

from server.gateway.caller import STRANGER, caller_of
from server.gateway.services import Services
from server.ui.assets import INDEX, asset_files, read_asset

_HEADERS: Final = {
    # Nothing from elsewhere, nothing inline, no place in a frame: what a model or an error says
    # stays text, even if the page were to show it as anything else.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Names stay the same from one version of the page to the next, so each use asks.
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


def pages_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()
    files = asset_files()
    _add_session_route(router, services)

    @router.head("/", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/ui")

    @router.head("/ui", include_in_schema=False)
    @router.get("/ui", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await _answer(request, files, INDEX)

    @router.head("/ui/{file}", include_in_schema=False)
    @router.get("/ui/{file}", include_in_schema=False)
    async def part(request: Request, file: str) -> Response:
        return await _answer(request, files, file)

    return router


def _add_session_route(router: APIRouter, services: Services) -> None:
    @router.get("/ui/session")
    async def session(request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        is_known = caller is not STRANGER
        return {
            "role": caller.role.value if is_known else "none",
            "keys_required": not services.keys.are_optional,
            "version": version("linker-llm") if is_known else None,
        }


async def _answer(request: Request, files: Mapping[str, Path], name: str) -> Response:
    """Returns a file as the client takes it, or that the client has it already.

    Raises:
        HTTPException: There is none of that name.
    """
    if name not in files:
        raise HTTPException(404)
    asset = await asyncio.to_thread(read_asset, files[name])
    headers = {**_HEADERS, "ETag": asset.etag}
    if _has(request, asset.etag):
        return Response(status_code=304, headers=headers)
    body = asset.body
    if _takes_gzip(request):
        body, headers["Content-Encoding"] = asset.compressed, "gzip"
    return Response(body, media_type=asset.media_type, headers=headers)


def _has(request: Request, etag: str) -> bool:
    """Whether a client says that it has this very file; tags are compared weakly (RFC 9110)."""
    said = ",".join(request.headers.getlist("If-None-Match"))
    tags = {tag.strip().removeprefix("W/") for tag in said.split(",")}
    return "*" in tags or etag.removeprefix("W/") in tags


def _takes_gzip(request: Request) -> bool:
    """Whether a client takes gzip: it names it, or anything, and not with a weight of zero."""
    weights = dict[str, str]()
    for part in ",".join(request.headers.getlist("Accept-Encoding")).split(","):
        coding, _, weight = part.strip().lower().partition(";")
        weights[coding.strip()] = weight.replace(" ", "").removeprefix("q=")
    weight = weights.get("gzip", weights.get("*", "0")) or "1"
    return weight.strip("0.") != ""
