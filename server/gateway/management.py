"""Models for operators: onboarding, dry runs, jobs, records."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator

from linker_core.errors import InvalidRequestError, NotReadyError, from_record
from server.gateway.body import read_object
from server.gateway.cards import dry_run_card, job_card, joint_card, model_card
from server.gateway.details import Detail, Details, Listed, of_many
from server.gateway.idempotency import once_of
from server.gateway.openapi import answers, takes
from server.gateway.schemas.operators import (
    FitBody,
    OnboardBody,
    PlanBody,
    ReplanBody,
    SharingBody,
)
from server.gateway.schemas.parsing import parse_request
from server.gateway.services import Services
from server.gateway.streaming import unless, unless_disconnected
from server.onboarding.fitting import FitRequest
from server.onboarding.hub.source import is_hub_source
from server.onboarding.request import AUTO_DONOR, OnboardRequest, resolve_sharing
from server.registry.records import JobRecord, JobStatus, ModelRecord
from server.settings import SharingSettings


def management_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()
    _add_job_routes(router, services)
    _add_dry_run_route(router, services)
    _add_model_routes(router, services)
    return router


def onboard_request(body: SharingBody, defaults: SharingSettings, *, name: str) -> OnboardRequest:
    """Returns the request with what the body leaves open filled in from the settings.

    Raises:
        InvalidRequestError: A revision of what has none, or two of them.
    """
    source = body.source
    if body.revision is not None:
        if not is_hub_source(source) or "@" in source:
            raise InvalidRequestError(
                "A revision is of a source hub:ORG/NAME that names none itself.", param="revision"
            )
        source = f"{source}@{body.revision}"
    return OnboardRequest(
        name=name,
        source=source,
        donor=body.donor or AUTO_DONOR,
        **resolve_sharing(body.model_dump(), defaults),
    )


def said(body: ReplanBody) -> dict[str, Any]:
    """Returns the policy and options of a body, None where it leaves them open."""
    return body.model_dump(include=set(ReplanBody.model_fields))


def shown_job(services: Services, job: JobRecord) -> dict[str, Any]:
    """Returns a job as clients see it."""
    return job_card(job, bytes_per_second=services.roster.bytes_per_second(job))


def shown_model(services: Services, name: str) -> dict[str, Any]:
    """Returns a model as operators see it.

    Raises:
        ModelNotFoundError: There is none of that name or alias.
    """
    record = services.shown(services.roster.named(name))
    return model_card(record, services.engine.snapshot)


async def until_succeeded(
    services: Services, http_request: Request, job: JobRecord, *, rest: str
) -> None:
    """Waits for a job for as long as the client does.

    Args:
        services: The server's parts.
        http_request: Whose client waits.
        job: What is under way, or has ended.
        rest: What a stop of the server means for it.

    Raises:
        LinkerError: Why the job failed, or that it was cancelled.
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


def _add_job_routes(router: APIRouter, services: Services) -> None:
    @router.get("/models/jobs")
    async def list_jobs() -> dict[str, Any]:
        jobs = await services.roster.jobs()
        return {"object": "list", "data": [shown_job(services, job) for job in jobs]}

    @router.get("/models/jobs/{job_id}")
    async def get_job(job_id: str) -> dict[str, Any]:
        return shown_job(services, await services.roster.known_job(job_id))

    @router.post("/models/jobs/{job_id}/cancel", responses=answers(200, "The cancelled job."))
    async def cancel_job(job_id: str) -> dict[str, Any]:
        return shown_job(services, await services.onboarder.cancel(job_id))


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
    body = parse_request(PlanBody, parsed)
    request = onboard_request(body, services.settings.sharing, name=body.name or "")
    found = await services.onboarder.rehearse(request, said=said(body))
    leaving: list[str] | None = []
    if found.needed_bytes > found.free_bytes:
        keep = frozenset() if found.donor is None else frozenset({found.donor})
        leaving = services.room.would_evict(found.needed_bytes, keep=keep)
        if leaving is not None:  # a twin is no model that anybody knows of
            leaving = [name for name in leaving if services.twin_rows.twin(name) is None]
    return dry_run_card(found, would_evict=leaving)


async def _fit(services: Services, parsed: dict[str, Any]) -> dict[str, Any]:
    body = parse_request(FitBody, parsed)
    sources = {model.name or model.source: model.source for model in body.models}
    if len(sources) < len(body.models):
        raise InvalidRequestError("Every model needs a name of its own.", param="models")
    request = FitRequest(
        sources=sources, donor=body.donor or AUTO_DONOR, budget_bytes=body.budget_bytes
    )
    return joint_card(await services.onboarder.fit(request))


def _options(body: OnboardBody) -> dict[str, Any]:
    """Returns what a body says of the model's options, as its row has it."""
    options: dict[str, Any] = {} if body.pin is None else {"pinned": body.pin}
    if "keep_alive" in body.model_fields_set:
        options["keep_alive_s"] = body.keep_alive
    return options


def _add_model_routes(router: APIRouter, services: Services) -> None:
    onboarder, roster = services.onboarder, services.roster
    details = Details(services.registry, services.catalog)

    @router.post(
        "/models",
        status_code=202,
        openapi_extra=takes(OnboardBody),
        responses=answers(202, "The job.") | answers(201, "The model, where `wait` is true."),
    )
    async def onboard(http_request: Request, *, wait: bool = False) -> JSONResponse:
        services.gate.check_open()
        parsed = await read_object(http_request)
        body = parse_request(OnboardBody, parsed)
        request = onboard_request(body, services.settings.sharing, name=body.name)
        once = once_of(http_request, parsed)
        async with services.replays.turn(once) as known:
            job = None if known is None else await roster.job(known)
            if job is None:
                options = _options(body)
                job = await onboarder.submit(request, said=said(body), options=options, once=once)
        if wait:
            rest = "its next start does the rest"
            await until_succeeded(services, http_request, job, rest=rest)
            return JSONResponse(shown_model(services, body.name), status_code=201)
        headers = {"Location": f"/models/jobs/{job.id}", "Retry-After": "1"}
        return JSONResponse(shown_job(services, job), status_code=202, headers=headers)

    @router.get("/models")
    async def list_models(
        include: Annotated[
            list[Annotated[Listed, BeforeValidator(of_many)]], Query(default_factory=list)
        ],
    ) -> dict[str, Any]:
        # All as it is now: models change, and go, while details are read.
        seen = [(record, shown_model(services, record.name)) for record in roster.models()]
        details.keep({record.name for record, _ in seen})
        return {"object": "list", "data": [await detailed(*each, include) for each in seen]}

    @router.get("/models/{name:path}")
    async def get_model(
        name: str, include: Annotated[list[Detail], Query(default_factory=list)]
    ) -> dict[str, Any]:
        return await detailed(roster.named(name), shown_model(services, name), include)

    async def detailed(
        record: ModelRecord, card: dict[str, Any], include: Collection[Detail]
    ) -> dict[str, Any]:
        return {**card, "details": await details.of(record, include)} if include else card
