"""GET /analysis: what fine-tuning did to the weights of families."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse

from linker_core.errors import ModelNotFoundError
from server.gateway.openapi import answers
from server.gateway.services import Services
from server.studies.cards import study_card

_JSON = "application/json"


def analysis_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()
    studies = services.studies

    @router.get(
        "/analysis",
        response_class=Response,
        responses=answers(200, "How the studies of all families' weights stand."),
    )
    async def list_studies() -> Response:
        finished = studies.finished()
        families = studies.families().items()
        cards = [study_card(studies, family, finished.get(label)) for label, family in families]
        return _written({"object": "list", "data": cards})

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
        card["summary"] = None if finished is None else finished.summary
        if not include:
            return _written(card)
        key = found.key if finished is None else finished.key
        parts = _with_tensors(card, studies.records(key))
        first = await anext(parts)  # what keeps the registry from being read is said in time
        return StreamingResponse(_behind(first, parts), media_type=_JSON)

    return router


def _written(answer: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(answer), media_type=_JSON)


async def _with_tensors(
    card: Mapping[str, Any], records: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """Yields a card with its tensors' records, which may be a hundred megabytes."""
    text = orjson.dumps(card).removesuffix(b"}") + b',"tensors":['
    async for record in records:
        yield text + record
        text = b","
    yield b"]}" if text == b"," else text + b"]}"


async def _behind(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part


def _unknown(services: Services, name: str) -> str:
    """Returns what is said of a name that is no family's."""
    record = services.roster.find(name)
    if record is not None:
        return f"The model {name!r} is of the family {record.family!r}; name that."
    return f"There is no family {name[:200]!r}. GET /analysis lists those there are."
