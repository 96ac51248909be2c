"""Brings stored models back into a new engine, with their stored plans."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    NotReadyError,
)
from linker_core.sharing.plan import SharePlan
from server.bridge.client import EngineClient
from server.onboarding.admission import Admission
from server.onboarding.outcomes import failed_model
from server.onboarding.planner import Planner, ignore_progress
from server.onboarding.prepare import read_again
from server.onboarding.roster import Roster
from server.onboarding.timing import Stopwatch
from server.registry.records import ModelRecord, ModelState
from server.residency.catalog import Catalog

logger = logging.getLogger(__name__)

_CRASHES_PER_MODEL = 2  # that many engine deaths while loading a stored model mark it failed

OnChanged = Callable[[ModelRecord], Awaitable[bool]]


class Restorer:
    """Loads what was ready before; `done` is set while the engine holds all of it.

    Args:
        roster: The known models.
        catalog: Filled with what is resident.
        planner: Knows fingerprints.
        admission: Loads models.

    Attributes:
        done: Set while the engine holds all of it.
        rows: Held from a look at a ready model's row until the engine has what it says, and by
            whoever changes both.

    `on_changed` is asked about a model whose files are others than it was onboarded from; it
    returns whether the model is being onboarded anew.
    """

    def __init__(
        self, *, roster: Roster, catalog: Catalog, planner: Planner, admission: Admission
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._planner = planner
        self._admission = admission
        self._current: str | None = None  # the model being loaded, also after the engine's death
        self._strikes: dict[str, int] = {}
        self._absent: dict[str, ModelRecord] = {}  # could not come back yet; rows say ready
        self.on_changed: OnChanged = _leave_it
        self.done = asyncio.Event()
        self.rows = asyncio.Lock()

    async def restore(self, client: EngineClient) -> None:
        """Brings back every model that was ready; donors first, then by last use.

        One broken model is marked failed and does not stop the others. Called with every new
        engine, and cancelled when that engine dies.
        """
        if self._current is not None:
            await self._strike(self._current)
        if await self._load_missing(client):
            self.done.set()

    async def catch_up(self) -> None:
        """Brings back what could not come while its donor or the engine was away."""
        client = self._admission.engine_or_none()
        if client is not None and self.done.is_set():
            await self._load_missing(client)

    def engine_down(self) -> None:
        """Closes every model to requests until the next engine has them."""
        self.done.clear()
        self._catalog.clear()

    async def engine(self) -> EngineClient:
        """Waits for an engine that holds all of it."""
        while True:
            await self.done.wait()
            client = self._admission.engine_or_none()
            if client is not None:
                return client
            self.engine_down()  # seen here before the supervisor could say so

    async def _load_missing(self, client: EngineClient) -> bool:
        """Loads what is ready by its row but not resident; False if the engine died on the way."""
        self._show_absent_again()
        ready = [
            record
            for record in self._roster.models()
            if record.state is ModelState.READY and self._catalog.get(record.name) is None
        ]
        ready.sort(key=self._turn)
        for record in ready:
            self._current = record.name
            try:
                await self._restore_one(record, client)
            except Exception as error:  # noqa: BLE001 - the edge of a model: its fault ends it alone
                if client.closed.is_set():
                    return False  # the next engine begins anew
                await self._set_aside(record, error)
            else:
                self._strikes.pop(record.name, None)
            self._current = None
        return True

    def _turn(self, record: ModelRecord) -> tuple[bool, bool, float]:
        """Sorts donors first, what has to be encoded again last, else by last use."""
        assert record.plan is not None
        slow = not self._admission.deltas.has(record.plan)
        return record.donor is not None, slow, -(record.last_used_at or record.created_at)

    async def _restore_one(self, listed: ModelRecord, client: EngineClient) -> None:
        async with self.rows:
            record = self._roster.find(listed.name)  # it may have another plan by now
            if record is not None and self._is_wanted(listed):
                await self._load(record, client)

    async def _load(self, record: ModelRecord, client: EngineClient) -> None:
        donor = None if record.donor is None else self._catalog.get(record.donor)
        if record.donor is not None and donor is None:
            raise NotReadyError(f"Its donor {record.donor!r} is not resident.")
        source = await asyncio.to_thread(read_again, Path(record.source), source=record.source)
        if await self._planner.fingerprint(source, donor) != record.fingerprint:
            if self._is_wanted(record) and await self.on_changed(record):
                return
            raise BadCheckpointError(
                "The model's files are not the ones it was onboarded from. Restore them, or "
                "delete the model and onboard it again."
            )
        assert record.plan is not None
        plan = SharePlan.from_json(record.plan)
        text = await self._planner.text_side(source, donor)
        weights = await self._admission.deltas.weights(
            plan, text, donor, watch=Stopwatch(), on_progress=ignore_progress
        )
        if not self._is_wanted(record):
            return
        arrival = await self._admission.load(record, text, plan, weights)
        if self._is_wanted(record):
            self._catalog.publish(arrival.model)
            logger.info("model %s is back", record.name)
        else:
            await client.unload(record.name)

    def _is_wanted(self, record: ModelRecord) -> bool:
        """Whether the model is still the one of this record: not deleted, not onboarded anew."""
        now = self._roster.find(record.name)
        return (
            now is not None
            and now.state is ModelState.READY
            and now.created_at == record.created_at
        )

    async def _set_aside(self, record: ModelRecord, error: Exception) -> None:
        if not self._is_wanted(record):
            return
        if isinstance(error, NotReadyError | InsufficientCapacityError):
            logger.warning("model %s cannot come back yet: %s", record.name, error.message)
            self._absent[record.name] = record
            self._roster.show(failed_model(record, error))  # its row still says ready
            return
        if isinstance(error, LinkerError):
            logger.error("model %s cannot be restored: %s", record.name, error.message)
            known = error
        else:
            logger.error("model %s failed through a fault of ours", record.name, exc_info=error)
            known = EngineFailureError("The model could not be restored; see the server's log.")
        await self._roster.settle(failed_model(record, known))

    def _show_absent_again(self) -> None:
        for name, record in self._absent.items():
            now = self._roster.find(name)
            failed = now is not None and now.state is ModelState.FAILED
            if failed and now is not None and now.created_at == record.created_at:
                self._roster.show(record)
        self._absent.clear()

    async def _strike(self, name: str) -> None:
        """Counts an engine's death against the model that was being loaded."""
        self._strikes[name] = self._strikes.get(name, 0) + 1
        record = self._roster.find(name)
        if record is not None and self._strikes[name] >= _CRASHES_PER_MODEL:
            error = EngineFailureError("The engine died repeatedly while it loaded this model.")
            await self._roster.settle(failed_model(record, error))
        self._current = None


async def _leave_it(_record: ModelRecord) -> bool:
    return False
