"""GET /models/events: what happens to models, jobs and the server, as it happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.gateway.caller import Caller, caller_of
from server.gateway.management import shown_job, shown_model
from server.gateway.openapi import answers
from server.gateway.services import Services
from server.gateway.status import Status, StatusNews
from server.gateway.streaming import DONE, EventStream, event, unless
from server.onboarding.feed import Changes, Listener

_PAUSE_S = 0.25  # between two looks; what happens meanwhile comes as one
_LOOK_S = 1.0  # how long nothing may have happened before the server's status is looked at


class _DrainingError(Exception):
    """The server takes no more work, so nothing more will happen."""


def events_router(services: Services) -> APIRouter:
    """Returns the route."""
    router = APIRouter()
    status = Status(services)

    @router.get(
        "/models/events",
        response_class=Response,
        responses=answers(200, "Changes of models, jobs and the server as events.", stream=True),
    )
    async def follow(request: Request) -> EventStream:
        services.gate.check_open()
        events = _events(services, caller_of(request), StatusNews(status))
        return EventStream(events, metrics=services.metrics)

    return router


async def _events(
    services: Services, caller: Caller, status: StatusNews
) -> AsyncGenerator[bytes, None]:
    """Yields everything there is, and then whatever changes, until the server drains.

    Raises:
        InvalidKeyError: The key that all this is told to has been revoked.
    """
    closing = services.gate.closing
    with services.roster.feed.listen() as listener:
        yield event(
            {
                "type": "snapshot",
                "models": [shown_model(services, m.name) for m in services.roster.models()],
                "jobs": [shown_job(services, job) for job in services.roster.live_jobs()],
            }
        )
        with suppress(_DrainingError):
            while True:
                services.keys.check(caller)  # which let it in, perhaps days ago
                if (news := status.take()) is not None:
                    yield event(news)
                changes = await unless(closing.wait(), _next(listener), error=_DrainingError())
                services.keys.check(caller)  # again: a second may have passed, or an hour
                for chunk in _tell(services, changes):
                    yield chunk
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE_S):
                        await closing.wait()
    yield DONE


async def _next(listener: Listener) -> Changes:
    """Returns what has changed, or that nothing has for a while."""
    try:
        async with asyncio.timeout(_LOOK_S):
            return await listener.take()
    except TimeoutError:
        return Changes([], [])


def _tell(services: Services, changes: Changes) -> list[bytes]:
    """Returns changes as events; a model is shown as it is now."""
    told = [event({"type": "job", "job": shown_job(services, job)}) for job in changes.jobs]
    for name in changes.models:
        if services.roster.find(name) is None:
            told.append(event({"type": "model.deleted", "id": name}))
        else:
            told.append(event({"type": "model", "model": shown_model(services, name)}))
    return told
