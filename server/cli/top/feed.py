"""The events of a running server, taken in while it is there, and again when it is back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from linker_core.errors import (
    InvalidRequestError,
    LinkerError,
    NotReadyError,
    QueueFullError,
    RateLimitError,
)
from server.cli.remote import NoServerError, key_headers, no_server, refusal
from server.cli.top.fleet import Fleet

_PATH = "/models/events"
_PASSING = (NoServerError, NotReadyError, QueueFullError, RateLimitError)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
# A server that fell off the net says nothing, and so does its connection; one that is idle says so
# twice in this time.
_TIMEOUTS = httpx.Timeout(10.0, read=30.0)


class _QuietError(Exception):
    """The server has said nothing for long."""


class Feed:
    """Keeps a fleet as the server has it. Event loop only.

    Args:
        url: Of the server.
        key: Of one who may watch; None: it asks for none.
        fleet: What is kept.
    """

    def __init__(self, url: str, key: str | None, fleet: Fleet) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._fleet = fleet
        self.begun = asyncio.Event()  # something is known
        self.compared = asyncio.Event()  # two statuses have come

    async def run(self) -> None:
        """Follows the server until it is cancelled.

        Raises:
            LinkerError: There was no server from the start, or it does not let us watch.
        """
        pause_s = _FIRST_PAUSE_S
        headers = key_headers(self._key)
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=_TIMEOUTS) as it:
            while True:
                try:
                    async for event in self._events(it):
                        pause_s = _FIRST_PAUSE_S
                        self._take(event)
                    self._fleet.trouble = "the server is shutting down"
                except _QuietError:
                    continue
                except _PASSING as error:
                    if not self.begun.is_set():
                        raise
                    self._fleet.trouble = _lost(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _take(self, event: Any) -> None:
        try:
            self._fleet.apply(event, now_s=time.monotonic())
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidRequestError(
                f"{self._url} says something that this command does not understand ({error!r}). "
                "Take the linker of the server's version; GET /version says which."
            ) from error
        self.begun.set()
        if self._fleet.has_rates:
            self.compared.set()

    async def _events(self, client: httpx.AsyncClient) -> AsyncIterator[Any]:
        """Yields events up to the end of the stream.

        Raises:
            LinkerError: There is no server, or it refuses.
        """
        try:
            async with client.stream("GET", _PATH) as response:
                if not response.is_success:
                    await response.aread()
                    raise refusal(self._url, response)
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise InvalidRequestError(f"{self._url} is no linker server. Check --url.")
                async for line in _lines(response):
                    if line.startswith("data: {"):
                        yield json.loads(line.removeprefix("data: "))
        except httpx.TransportError as error:
            raise no_server(self._url, error) from error


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    try:
        async for line in response.aiter_lines():
            yield line
    except httpx.ReadTimeout as error:
        raise _QuietError from error


def _lost(error: LinkerError) -> str:
    if isinstance(error, NoServerError):
        return "the server is gone"
    return error.message
