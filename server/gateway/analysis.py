"""GET /analysis: what fine-tuning did to the weights of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from linker_core.errors import ModelNotFoundError
from server.gateway.openapi import answers
from server.gateway.services import Services
from server.studies.cards import study_card, tensor_rows


def analysis_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()
    studies = services.studies

    @router.get(
        "/analysis",
        response_class=Response,
        responses=answers(200, "The studies of all families' weights."),
    )
    async def list_studies() -> Response:
        finished = studies.finished()
        families = studies.families().items()
        cards = [study_card(studies, family, finished.get(label)) for label, family in families]
        return await _written({"object": "list", "data": cards})

    @router.get(
        "/analysis/{family:path}",
        response_class=Response,
        responses=answers(200, "The study of a family's weights."),
    )
    async def get_study(
        family: str,
        include: Annotated[list[Literal["tensors"]], Query(default_factory=list)],
    ) -> Response:
        found = studies.families().get(family)
        if found is None:
            raise ModelNotFoundError(_unknown(services, family), param="family")
        finished = studies.finished().get(family)
        card = study_card(studies, found, finished)
        if include:
            key = found.key if finished is None else finished.key
            card["tensors"] = [] if key is None else tensor_rows(dict(await studies.tensors(key)))
        return await _written(card)

    return router


async def _written(answer: Mapping[str, Any]) -> Response:
    """Returns JSON that may be megabytes: of many families, or of a large one's tensors."""
    body = await run_in_threadpool(orjson.dumps, answer)
    return Response(body, media_type="application/json")


def _unknown(services: Services, name: str) -> str:
    """Returns what is said of a name that is no family's."""
    record = services.roster.find(name)
    if record is not None:
        return f"The model {name!r} is of the family {record.family!r}; name that."
    return f"There is no family {name[:200]!r}. GET /analysis lists those there are."
