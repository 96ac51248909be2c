"""Writes down when models were used, and what could not be written at its time. Event loop only."""

from __future__ import annotations

import asyncio
import logging

from linker_core.errors import NotReadyError
from server.onboarding.row_writes import RowWrites
from server.residency.catalog import Catalog

logger = logging.getLogger(__name__)

_FLUSH_S = 5.0


class LastUse:
    """Stores what the catalog has seen.

    Args:
        catalog: Sees requests come and go.
        writes: Changes rows.
    """

    def __init__(self, *, catalog: Catalog, writes: RowWrites) -> None:
        self._catalog = catalog
        self._writes = writes

    async def flush(self) -> None:
        """Writes down when models were used, now and then, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self.flush_once()

    async def flush_once(self) -> None:
        """Writes down what is not stored yet; what cannot be written now is kept."""
        used_at = self._catalog.take_used()
        try:
            await self._writes.note_use(used_at)
            await self._writes.write_later()
        except NotReadyError as error:
            logger.warning("the registry cannot be written: %s", error.message)
            self._catalog.give_back(used_at)
