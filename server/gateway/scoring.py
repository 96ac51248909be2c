"""POST /models/scores: what a benchmark found out about a model, to be shown beside its plan."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.gateway.body import read_object
from server.gateway.management import shown_model
from server.gateway.openapi import answers, takes
from server.gateway.schemas.parsing import parse_request
from server.gateway.schemas.scores import ScoresBody
from server.gateway.services import Services
from server.onboarding.scores import TaskScore, add_scores


def scoring_router(services: Services) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post(
        "/models/scores",
        openapi_extra=takes(ScoresBody),
        responses=answers(200, "The model with its scores."),
    )
    async def score(http_request: Request) -> dict[str, Any]:
        services.gate.check_open()
        body = parse_request(ScoresBody, await read_object(http_request))
        name = services.roster.named(body.model).name
        scores = [
            TaskScore(
                task=task,
                metrics=said.metrics,
                stderr=said.stderr,
                num_samples=said.num_samples,
                num_fewshot=said.num_fewshot,
                is_partial=said.is_partial,
                harness=body.harness,
            )
            for task, said in body.tasks.items()
        ]
        await add_scores(services.roster, name, body.variant_mode, scores, plan=body.plan)
        return shown_model(services, name)

    return router
