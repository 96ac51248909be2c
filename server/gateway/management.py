"""Which models there are: OpenAI's listing, onboarding, deletion, jobs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from linker_core.errors import InvalidRequestError, ModelNotFoundError, NotReadyError, from_record
from server.gateway.body import read_object
from server.gateway.cards import dry_run_card, job_card, joint_card, model_card, openai_card
from server.gateway.openapi import answers, takes
from server.gateway.schemas import (
    ONBOARD_NEUTRAL,
    FitBody,
    OnboardBody,
    PlanBody,
    ReplanBody,
    SharingBody,
    parse_request,
)
from server.gateway.services import Services
from server.gateway.streaming import unless, unless_disconnected
from server.onboarding.fitting import FitRequest
from server.onboarding.request import AUTO_DONOR, OnboardRequest, resolve_sharing
from server.registry.records import JobRecord, JobStatus
from server.settings import SharingSettings


def management_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()
    _add_openai_routes(router, services)
    _add_job_routes(router, services)
    _add_dry_run_route(router, services)
    _add_model_routes(router, services)
    _add_change_routes(router, services)
    return router


def onboard_request(body: SharingBody, defaults: SharingSettings, *, name: str) -> OnboardRequest:
    """Returns the request with what the body leaves open filled in from the settings."""
    return OnboardRequest(
        name=name,
        source=body.source,
        donor=body.donor or AUTO_DONOR,
        **resolve_sharing(body.model_dump(), defaults),
    )


def said(body: ReplanBody) -> dict[str, Any]:
    """Returns the policy and options of a body, None where it leaves them open."""
    return body.model_dump(include=set(ReplanBody.model_fields))


def _add_openai_routes(router: APIRouter, services: Services) -> None:
    @router.get("/v1/models")
    async def list_served() -> dict[str, Any]:
        models = services.catalog.models()
        return {"object": "list", "data": [openai_card(model) for model in models]}

    @router.get("/v1/models/{name:path}")
    async def get_served(name: str) -> dict[str, Any]:
        return openai_card(services.served(name))


def _job_card(services: Services, job: JobRecord) -> dict[str, Any]:
    return job_card(job, bytes_per_second=services.roster.bytes_per_second(job))


def _add_job_routes(router: APIRouter, services: Services) -> None:
    @router.get("/models/jobs")
    async def list_jobs() -> dict[str, Any]:
        jobs = await services.roster.jobs()
        return {"object": "list", "data": [_job_card(services, job) for job in jobs]}

    @router.get("/models/jobs/{job_id}")
    async def get_job(job_id: str) -> dict[str, Any]:
        job = await services.roster.job(job_id)
        if job is None:
            raise ModelNotFoundError("There is no such job.", param="id")
        return _job_card(services, job)

    @router.post("/models/jobs/{job_id}/cancel", responses=answers(200, "The cancelled job."))
    async def cancel_job(job_id: str) -> dict[str, Any]:
        return _job_card(services, await services.onboarder.cancel(job_id))


def _add_dry_run_route(router: APIRouter, services: Services) -> None:
    @router.post(
        "/models/plan",
        openapi_extra=takes(PlanBody, FitBody),
        responses=answers(200, "What onboarding the model would share, cost and take."),
    )
    async def plan(http_request: Request) -> dict[str, Any]:
        services.gate.check_open()
        parsed = await read_object(http_request)
        work = _fit(services, parsed) if "models" in parsed else _rehearse(services, parsed)
        ended = unless(
            services.gate.closing.wait(),
            work,
            error=NotReadyError("The server is shutting down."),
        )
        return await unless_disconnected(http_request, ended)


async def _rehearse(services: Services, parsed: dict[str, Any]) -> dict[str, Any]:
    body = parse_request(PlanBody, parsed, neutral=ONBOARD_NEUTRAL)
    request = onboard_request(body, services.settings.sharing, name=body.name or "")
    return dry_run_card(await services.onboarder.rehearse(request, said=said(body)))


async def _fit(services: Services, parsed: dict[str, Any]) -> dict[str, Any]:
    body = parse_request(FitBody, parsed, neutral={})
    sources = {model.name or model.source: model.source for model in body.models}
    if len(sources) < len(body.models):
        raise InvalidRequestError("Every model needs a name of its own.", param="models")
    request = FitRequest(
        sources=sources, donor=body.donor or AUTO_DONOR, budget_bytes=body.budget_bytes
    )
    return joint_card(await services.onboarder.fit(request))


def _model_card(services: Services, name: str) -> dict[str, Any]:
    record = services.shown(services.roster.model(name))
    return model_card(record, services.engine.snapshot)


async def _until_succeeded(
    services: Services, http_request: Request, job: JobRecord, *, rest: str
) -> None:
    """Waits for a job for as long as the client does.

    Args:
        services: The server's parts.
        http_request: Whose client waits.
        job: What is under way.
        rest: What a stop of the server means for it.

    Raises:
        LinkerError: Why the job failed.
        NotReadyError: The server shuts down.
    """
    ended = unless(
        services.gate.closing.wait(),
        services.onboarder.wait(job.id),
        error=NotReadyError(f"The server is shutting down; {rest}."),
    )
    done = await unless_disconnected(http_request, ended)
    if done.status is not JobStatus.SUCCEEDED:
        assert done.error is not None
        raise from_record(dict(done.error))


def _add_model_routes(router: APIRouter, services: Services) -> None:
    onboarder, roster = services.onboarder, services.roster

    @router.post(
        "/models",
        status_code=202,
        openapi_extra=takes(OnboardBody),
        responses=answers(202, "The job.") | answers(201, "The model, where `wait` is true."),
    )
    async def onboard(http_request: Request, *, wait: bool = False) -> JSONResponse:
        services.gate.check_open()
        parsed = await read_object(http_request)
        body = parse_request(OnboardBody, parsed, neutral=ONBOARD_NEUTRAL)
        request = onboard_request(body, services.settings.sharing, name=body.name)
        job = await onboarder.submit(request, said=said(body))
        if wait:
            rest = "its next start does the rest"
            await _until_succeeded(services, http_request, job, rest=rest)
            return JSONResponse(_model_card(services, body.name), status_code=201)
        headers = {"Location": f"/models/jobs/{job.id}", "Retry-After": "1"}
        return JSONResponse(_job_card(services, job), status_code=202, headers=headers)

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(services, m.name) for m in roster.models()]}

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        return _model_card(services, name)


def _add_change_routes(router: APIRouter, services: Services) -> None:
    onboarder = services.onboarder

    @router.patch(
        "/models/{name:path}",
        status_code=202,
        openapi_extra=takes(ReplanBody),
        responses=answers(202, "The job.")
        | answers(200, "The job that made that plan, or where `wait` is true the model."),
    )
    async def replan(http_request: Request, name: str, *, wait: bool = False) -> JSONResponse:
        services.gate.check_open()
        parsed = await read_object(http_request)
        body = parse_request(ReplanBody, parsed, neutral=ONBOARD_NEUTRAL)
        job = await onboarder.replan(name, said(body), services.settings.sharing)
        if wait:
            if job.finished_at is None:
                rest = "the model keeps its plan"
                await _until_succeeded(services, http_request, job, rest=rest)
            return JSONResponse(_model_card(services, name))
        headers = {"Location": f"/models/jobs/{job.id}"}
        if job.finished_at is not None:
            return JSONResponse(_job_card(services, job), headers=headers)
        return JSONResponse(
            _job_card(services, job), status_code=202, headers={**headers, "Retry-After": "1"}
        )

    @router.delete("/models/{name:path}")
    @router.delete("/v1/models/{name:path}")
    async def delete_model(name: str, *, rehome: bool = False) -> dict[str, Any]:
        await onboarder.delete(name, rehome=rehome)
        return {"id": name, "object": "model", "deleted": True}
