"""Brings stored models back into a new engine, with their stored plans."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from linker_core.errors import BadCheckpointError, EngineFailureError, LinkerError
from linker_core.sharing.plan import SharePlan
from server.bridge.client import EngineClient
from server.onboarding.admission import Admission
from server.onboarding.catalog import Catalog
from server.onboarding.prepare import read_text_side
from server.onboarding.roster import Roster, failed_model
from server.registry.records import ModelRecord, ModelState

logger = logging.getLogger(__name__)

_CRASHES_PER_MODEL = 2  # that many engine deaths while loading a stored model mark it failed


class Restorer:
    """Loads what was ready before; `done` is set while the engine holds all of it.

    Args:
        roster: The known models.
        catalog: Filled with what is resident.
        admission: Loads models.
    """

    def __init__(self, *, roster: Roster, catalog: Catalog, admission: Admission) -> None:
        self._roster = roster
        self._catalog = catalog
        self._admission = admission
        self._current: str | None = None  # the model being loaded, also after the engine's death
        self._strikes: dict[str, int] = {}
        self.done = asyncio.Event()

    async def restore(self, _client: EngineClient) -> None:
        """Brings back every model that was ready; donors first, then by last use.

        One broken model is marked failed and does not stop the others. Called with every new
        engine, and cancelled when that engine dies.
        """
        if self._current is not None:
            await self._strike(self._current)
        ready = [r for r in self._roster.models() if r.state is ModelState.READY]
        ready.sort(key=lambda r: (r.donor is not None, -(r.last_used_at or r.created_at)))
        for record in ready:
            self._current = record.name
            try:
                await self._restore_one(record)
            except EngineFailureError:
                return  # the engine is gone; the next one begins anew
            except LinkerError as error:
                logger.error("model %s cannot be restored: %s", record.name, error.message)
                await self._roster.save(failed_model(record, error))
            self._current = None
        self.done.set()

    def engine_down(self) -> None:
        """Closes every model to requests until the next engine has them."""
        self.done.clear()
        self._catalog.clear()

    async def _restore_one(self, record: ModelRecord) -> None:
        text = await asyncio.to_thread(read_text_side, Path(record.source))
        if await self._admission.fingerprint(text) != record.fingerprint:
            raise BadCheckpointError(
                "The model's files are not the ones it was onboarded from. Restore them, or "
                "delete the model and onboard it again."
            )
        assert record.plan is not None
        plan = SharePlan.from_json(dict(record.plan))
        self._catalog.publish(await self._admission.load(record, text, plan))

    async def _strike(self, name: str) -> None:
        """Counts an engine's death against the model that was being loaded."""
        self._strikes[name] = self._strikes.get(name, 0) + 1
        record = self._roster.find(name)
        if record is not None and self._strikes[name] >= _CRASHES_PER_MODEL:
            error = EngineFailureError("The engine died repeatedly while it loaded this model.")
            await self._roster.save(failed_model(record, error))
        self._current = None
