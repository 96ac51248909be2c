"""Keeps the model of a request resident, from before it is tokenised until its last byte."""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi import Request

from linker_core.errors import NotReadyError
from server.gateway.services import Services
from server.gateway.streaming import unless, unless_disconnected
from server.residency.catalog import ServedModel


async def hold(
    services: Services, http_request: Request, name: str, until: AsyncExitStack
) -> ServedModel:
    """Returns a model that stays resident until a stack is closed; an evicted one comes back.

    Args:
        services: Of the server.
        http_request: Whose client waits; its body must have been read.
        name: The model's, or an alias.
        until: The stack.

    Raises:
        LinkerError: See `OnDemand.acquire`; or the server is shutting down.
        ClientLeftError: Nobody waits any more. Whatever is being loaded comes all the same.
    """
    resident = services.catalog.get(services.roster.named(name).name) is not None
    entering = until.enter_async_context(services.on_demand.acquire(name))
    if resident:
        return await entering
    ended = unless(
        services.gate.closing.wait(),
        entering,
        error=NotReadyError("The server is shutting down."),
    )
    return await unless_disconnected(http_request, ended)
