"""Evicts models that nobody has asked for longer than they are to be kept."""

from __future__ import annotations

import asyncio
import logging

from linker_core.errors import LinkerError
from server.metrics.evictions import EvictionReason
from server.registry.records import ModelRecord
from server.residency.catalog import Catalog
from server.residency.evictions import Evictions
from server.residency.rows import Rows

logger = logging.getLogger(__name__)

_LOOK_S = 0.5  # between two looks


class KeepAlive:
    """Looks now and then whose time is over.

    A donor stays for as long as models that lean on it are resident.

    Args:
        catalog: The resident models.
        rows: Say how long each is kept.
        evictions: Takes models out.
        default_s: For models that do not say; None: for ever.
    """

    def __init__(
        self, *, catalog: Catalog, rows: Rows, evictions: Evictions, default_s: float | None
    ) -> None:
        self._catalog = catalog
        self._rows = rows
        self._evictions = evictions
        self._default_s = default_s

    async def run(self) -> None:
        """Evicts until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Evicts whose time is over now; variants before their donors."""
        for model in reversed(self._catalog.models()):
            record = self._rows.find(model.name)
            if record is None or not self._is_over(record):
                continue
            try:
                await self._evictions.evict_idle(model.name, EvictionReason.IDLE)
            except LinkerError as error:
                logger.warning("model %s was not evicted: %s", model.name, error.message)

    def _is_over(self, record: ModelRecord) -> bool:
        kept_s = self._default_s if record.keep_alive_s is None else record.keep_alive_s
        idle = self._evictions.is_idle(record.name)
        return kept_s is not None and idle and self._catalog.idle_s(record.name) >= kept_s
