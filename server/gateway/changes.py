"""Changes of known models: options, plans, loading, unloading, deletion."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from linker_core.errors import ConflictError, InvalidRequestError
from server.gateway.body import read_object
from server.gateway.holding import hold
from server.gateway.idempotency import once_of
from server.gateway.management import said, shown_job, shown_model, until_succeeded
from server.gateway.openapi import answers, takes
from server.gateway.schemas.operators import ChangeBody, LoadBody, ReplanBody, UnloadBody
from server.gateway.schemas.parsing import parse_request
from server.gateway.services import Services
from server.registry.records import JobRecord, ModelRecord, ModelState


def changes_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()
    _add_change_route(router, services)
    _add_load_routes(router, services)
    _add_deletion_routes(router, services)
    return router


def _add_change_route(router: APIRouter, services: Services) -> None:
    @router.patch(
        "/models/{name:path}",
        openapi_extra=takes(ChangeBody),
        responses=answers(202, "The job of another plan.")
        | answers(200, "The model; or the job that made just that plan."),
    )
    async def change(http_request: Request, name: str, *, wait: bool = False) -> JSONResponse:
        services.gate.check_open()
        parsed = await read_object(http_request)
        body = parse_request(ChangeBody, parsed)
        once = once_of(http_request, parsed)
        options = _options(body)
        record = services.roster.named(name)
        _check_change(body, options, record)
        name = record.name  # the alias may be gone afterwards
        async with services.replays.turn(once) as known:
            if known is not None:
                job = await services.roster.job(known)
            else:
                job = await services.onboarder.change(
                    name,
                    options=options,
                    said=said(body),
                    defaults=services.settings.sharing,
                    once=once,
                )
        if job is None:
            return JSONResponse(shown_model(services, name))
        if wait:
            await until_succeeded(services, http_request, job, rest="the model keeps its plan")
            return JSONResponse(shown_model(services, name))
        return _job_response(services, job)


def _check_change(body: ChangeBody, options: Mapping[str, Any], record: ModelRecord) -> None:
    """Refuses a body that changes nothing, and a pin on what cannot be loaded.

    Raises:
        InvalidRequestError: Nothing is said.
        ConflictError: The model has failed.
    """
    if not options and all(value is None for value in said(body).values()):
        taken = ("pin", "alias", "keep_alive", *ReplanBody.model_fields)
        raise InvalidRequestError(f"Say what to change: {', '.join(taken)}.")
    if body.pin and record.state is ModelState.FAILED:
        raise ConflictError(
            f"The model {record.name!r} has failed, so a pin cannot keep it. Onboard it again with "
            "POST /models, which takes a pin, or delete it.",
            param="pin",
        )


def _options(body: ChangeBody) -> Mapping[str, Any]:
    """Returns what a body says of a model's options, as its row has it."""
    options: dict[str, Any] = {}
    if body.pin is not None:
        options["pinned"] = body.pin
    if "alias" in body.model_fields_set:
        options["alias"] = body.alias
    if "keep_alive" in body.model_fields_set:
        options["keep_alive_s"] = body.keep_alive
    return options


def _job_response(services: Services, job: JobRecord) -> JSONResponse:
    headers = {"Location": f"/models/jobs/{job.id}"}
    if job.finished_at is not None:
        return JSONResponse(shown_job(services, job), headers=headers)
    headers["Retry-After"] = "1"
    return JSONResponse(shown_job(services, job), status_code=202, headers=headers)


def _add_load_routes(router: APIRouter, services: Services) -> None:
    @router.post(
        "/models/load",
        openapi_extra=takes(LoadBody),
        responses=answers(200, "The model, which is resident.")
        | answers(202, "The model, which is being loaded, where `wait` is false."),
    )
    async def load(http_request: Request) -> JSONResponse:
        services.gate.check_open()
        body = parse_request(LoadBody, await read_object(http_request))
        name = services.roster.named(body.model).name
        if body.wait is False:
            services.on_demand.begin(name)
            return JSONResponse(shown_model(services, name), status_code=202)
        async with AsyncExitStack() as until:
            await hold(services, http_request, name, until)
            return JSONResponse(shown_model(services, name))

    @router.post(
        "/models/unload",
        openapi_extra=takes(UnloadBody),
        responses=answers(200, "The model, which has left the device."),
    )
    async def unload(http_request: Request) -> JSONResponse:
        body = parse_request(UnloadBody, await read_object(http_request))
        name = services.roster.named(body.model).name
        await services.onboarder.unload(name, rehome=body.rehome or False)
        return JSONResponse(shown_model(services, name))


def _add_deletion_routes(router: APIRouter, services: Services) -> None:
    @router.delete("/models/{name:path}")
    @router.delete("/v1/models/{name:path}")
    async def delete_model(name: str, *, rehome: bool = False) -> dict[str, Any]:
        await services.onboarder.delete(name, rehome=rehome)
        return {"id": name, "object": "model", "deleted": True}
