"""GET /v1/models: what can be served, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.gateway.cards import openai_card
from server.gateway.prefix import prefix_model
from server.gateway.services import Services
from server.registry.records import ModelRecord, ModelState
from server.residency.on_demand import not_servable


def listing_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_served(request: Request) -> dict[str, Any]:
        one = prefix_model(request)
        if one is not None:
            return {"object": "list", "data": [card(one)]}
        data = []
        for record in servable(services):
            data.append(openai_card(record, name=record.name))
            if record.alias is not None:
                data.append(openai_card(record, name=record.alias))
        return {"object": "list", "data": data}

    @router.get("/v1/models/{name:path}")
    async def get_served(name: str) -> dict[str, Any]:
        return card(name)

    def card(name: str) -> dict[str, Any]:
        record = services.shown(services.roster.named(name))
        if record.state not in (ModelState.READY, ModelState.UNLOADED):
            raise not_servable(record, services.roster.outlook(record.name))
        return openai_card(record, name=name)

    return router


def servable(services: Services) -> list[ModelRecord]:
    """Returns the models that answer requests, a donor before its variants."""
    seen = [services.shown(record) for record in services.roster.models()]
    position = {record.name: record.position for record in seen}

    def order(record: ModelRecord) -> tuple[int, bool, int]:
        donor = record.donor or record.name
        return position.get(donor, record.position), record.donor is not None, record.position

    states = (ModelState.READY, ModelState.UNLOADED)
    return sorted((record for record in seen if record.state in states), key=order)
