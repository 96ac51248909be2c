"""Keeps the model of a request resident, from before it is tokenised until its last byte."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

from fastapi import Request

from linker_core.errors import NotReadyError
from server.gateway.schemas.generation import VariantMode
from server.gateway.services import Services
from server.gateway.streaming import unless, unless_disconnected
from server.residency.catalog import ServedModel


async def hold(
    services: Services,
    http_request: Request,
    name: str,
    until: AsyncExitStack,
    *,
    mode: VariantMode | None = None,
) -> ServedModel:
    """Returns a model that stays resident until a stack is closed; an evicted one comes back.

    Args:
        services: Of the server.
        http_request: Whose client waits; its body must have been read.
        name: The model's, or an alias.
        until: The stack.
        mode: Whose weights answer; None: as planned.

    Raises:
        LinkerError: See `OnDemand.acquire` and `TwinRows.unshared`; or the server is shutting down.
        ClientLeftError: Nobody waits any more. Whatever is being loaded comes all the same.
    """
    record = services.roster.named(name)
    wanted = _wanted(services, name, mode)
    resident = services.catalog.get(wanted) is not None
    entering = until.enter_async_context(services.on_demand.acquire(wanted))
    if not resident:
        ended = unless(
            services.gate.closing.wait(),
            entering,
            error=NotReadyError("The server is shutting down."),
        )
        entering = unless_disconnected(http_request, ended)
    held = await entering
    if wanted == record.name:
        return held
    services.catalog.touch(record.name)
    return replace(held, name=record.name, answered_by=wanted)


def to_be_loaded(services: Services, name: str, *, mode: VariantMode | None) -> ServedModel | None:
    """Returns what is known of a model that has to be loaded for a request, to check that first.

    Args:
        services: Of the server.
        name: The model's, or an alias.
        mode: Whose weights are to answer.

    Returns:
        None where it is resident, or nothing is known of it.

    Raises:
        LinkerError: See `TwinRows.unshared`; or there is no such model.
    """
    wanted = _wanted(services, name, mode)
    if services.catalog.get(wanted) is not None:
        return None
    owner = services.roster.named(name).name
    return services.catalog.get(owner) or services.catalog.dormant(owner)


def _wanted(services: Services, name: str, mode: VariantMode | None) -> str:
    """Returns the name of what is to answer."""
    record = services.roster.named(name)
    return services.twin_rows.unshared(record) if mode == "unshared" else record.name
