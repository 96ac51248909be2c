"""Brings back what a new engine is to serve: what was ready, and at a start what is to be there.

Nobody is evicted for it. What finds no room comes back when it is asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace

from linker_core.errors import (
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    NotReadyError,
)
from server.bridge.client import EngineClient
from server.onboarding.admission import Admission
from server.onboarding.outcomes import failed_model
from server.onboarding.returning import Returning
from server.onboarding.roster import Roster
from server.registry.records import ModelRecord, ModelState
from server.residency.catalog import Catalog

logger = logging.getLogger(__name__)


class Restorer:
    """Loads what was ready before; `done` is set while the engine holds all of it.

    Args:
        roster: The known models.
        catalog: Filled with what is resident.
        admission: Has the engine, and knows what has to be encoded again.
        returning: Loads one.

    Attributes:
        returning: As given.
        done: Set while the engine holds all of it.
        at_start: Models that are loaded at the start of the server, whatever they were before.
    """

    def __init__(
        self, *, roster: Roster, catalog: Catalog, admission: Admission, returning: Returning
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._admission = admission
        self.returning = returning
        self._left_out: set[str] = set()  # of what was to come back
        self._started = False
        self.at_start: frozenset[str] = frozenset()
        self.done = asyncio.Event()

    async def restore(self, client: EngineClient) -> None:
        """Brings back every model that was ready, and at the first time those of the start.

        Pinned and start-up models come first, donors before their variants, then by last use. One
        broken model is marked failed and does not stop the others. Called with every new engine,
        and cancelled when that engine dies.
        """
        await self.returning.give_up_killers()
        if await self._load(self._missing(), client):
            self._started = True
            self.done.set()

    async def catch_up(self) -> None:
        """Tries again what found no room, no engine or no donor, as far as it is not there yet.

        Waits for nobody: what is on its way already, or whose donor is, is left for the next time,
        and so is what the engine dies before.
        """
        client = self._admission.engine_or_none()
        if client is not None and self.done.is_set():
            models = [model for model in self._roster.models() if self._is_left_out(model)]
            self._left_out = {model.name for model in models}
            await self._load(models, client, waits=False)

    def engine_down(self) -> None:
        """Closes every model to requests until the next engine has them."""
        self.returning.engine_down()
        self._close()

    @property
    def is_restored(self) -> bool:
        """Whether there is an engine that holds all of it."""
        return self.done.is_set() and self._admission.engine_or_none() is not None

    async def engine(self) -> EngineClient:
        """Waits for an engine that holds all of it."""
        while True:
            await self.done.wait()
            client = self._admission.engine_or_none()
            if client is not None:
                return client
            self._close()  # seen here before the supervisor could say so

    def _close(self) -> None:
        self.done.clear()
        self._catalog.clear()

    def _missing(self) -> list[ModelRecord]:
        """Returns what has to be there and is not."""
        return [
            record
            for record in self._roster.models()
            if self._catalog.get(record.name) is None
            and (record.state is ModelState.READY or self._is_for_start(record))
        ]

    def _is_left_out(self, record: ModelRecord) -> bool:
        """Whether a model was to come back, and has not by now."""
        left_out = record.name in self._left_out and self._catalog.get(record.name) is None
        return left_out and record.state is ModelState.UNLOADED

    def _is_moving(self, record: ModelRecord) -> bool:
        """Whether somebody brings a model or its donor back, or takes it out."""
        names = [record.name] if record.donor is None else [record.name, record.donor]
        return any(self._catalog.turn(name).wanted for name in names)

    def _is_for_start(self, record: ModelRecord) -> bool:
        to_come = record.state is ModelState.UNLOADED and not self._started
        return to_come and self._is_preferred(record)

    def _is_preferred(self, record: ModelRecord) -> bool:
        return record.pinned or record.name in self.at_start

    async def _load(
        self, records: Iterable[ModelRecord], client: EngineClient, *, waits: bool = True
    ) -> bool:
        """Loads models in their order; False if the engine died on the way.

        Args:
            records: The models.
            client: The engine.
            waits: Whether it waits for those that are on their way already.
        """
        preferred = {r.name for r in self._roster.models() if self._is_preferred(r)}
        preferred |= {r.donor for r in self._roster.models() if r.name in preferred and r.donor}

        def place(record: ModelRecord) -> tuple[bool, bool, bool, float]:
            """What has to be encoded again comes last of its kind."""
            slow = record.plan is not None and not self._admission.deltas.has(record.plan)
            last_use = record.last_used_at or record.created_at
            return record.name not in preferred, record.donor is not None, slow, -last_use

        for record in sorted(records, key=place):
            if not waits and self._is_moving(record):
                continue
            async with self._catalog.turn(record.name):  # until its row says what became of it
                try:
                    if self.returning.is_wanted(record):
                        await self.returning.bring_back(record.name, may_evict=False)
                except Exception as error:  # noqa: BLE001 - the edge of a model, which ends alone
                    if client.closed.is_set():
                        return False  # the next engine begins anew
                    self._left_out.discard(record.name)
                    await self._set_aside(record, error)
                else:
                    self._left_out.discard(record.name)
        return True

    async def _set_aside(self, listed: ModelRecord, error: Exception) -> None:
        """Says of a model that could not come back what it is from now on."""
        if not self.returning.is_wanted(listed):
            return  # deleted, onboarded anew, or marked failed already
        record = self._roster.model(listed.name)
        if isinstance(error, NotReadyError | InsufficientCapacityError):
            logger.warning("model %s cannot come back yet: %s", record.name, error.message)
            self._left_out.add(record.name)
            why = error.to_record() if isinstance(error, NotReadyError) else None
            await self._roster.settle(replace(record, state=ModelState.UNLOADED, error=why))
            return
        if isinstance(error, LinkerError):
            logger.error("model %s cannot be restored: %s", record.name, error.message)
            known = error
        else:
            logger.error("model %s failed through a fault of ours", record.name, exc_info=error)
            known = EngineFailureError("The model could not be restored; see the server's log.")
        self._catalog.retract(record.name)
        await self._roster.settle(failed_model(record, known))
