"""Looks now and then whether the registry can be written, whether or not anybody wants to."""

from __future__ import annotations

import asyncio
import contextlib

from linker_core.errors import NotReadyError
from server.registry.store import Registry

_PERIOD_S = 5.0


async def watch(registry: Registry) -> None:
    """Probes the registry, which keeps what came of it, until cancelled."""
    while True:
        with contextlib.suppress(NotReadyError):  # it has been logged
            await asyncio.to_thread(registry.probe)
        await asyncio.sleep(_PERIOD_S)
