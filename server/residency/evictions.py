"""Takes models off the device; their rows stay, and a request brings them back. Event loop only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from linker_core.errors import ConflictError, EngineFailureError, LinkerError, NotReadyError
from server.bridge.client import EngineClient
from server.metrics.evictions import EvictionMetrics, EvictionReason
from server.registry.records import ModelState
from server.residency.catalog import Catalog, ServedModel, Turn
from server.residency.rows import Rows

logger = logging.getLogger(__name__)


class Evictions:
    """The way out: closed to new requests, unused, out of the engine, unloaded by its row.

    An eviction that has begun goes on to its end, whoever waits for it.

    Args:
        catalog: The resident models.
        rows: The known models.
        engine: Returns the engine, or raises `NotReadyError`.
        metrics: Counts.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        rows: Rows,
        engine: Callable[[], EngineClient],
        metrics: EvictionMetrics,
    ) -> None:
        self._catalog = catalog
        self._rows = rows
        self._engine = engine
        self._metrics = metrics
        self._leaving: set[str] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._unused: set[asyncio.Task[None]] = set()  # of those, what waits for no requests

    async def evict_idle(self, name: str, reason: EvictionReason) -> bool:
        """Evicts a model that nobody needs now; False if somebody does.

        Nothing is waited for before the model is closed to requests, so that what was true when the
        caller looked is true then. The engine may know better: a variant that is still on its way
        out needs its donor.

        Raises:
            EngineFailureError: The engine ended meanwhile; its row says as before what is wanted.
        """
        if not self.is_idle(name) or self._catalog.dependants(name):
            return False
        turn = self._catalog.turn(name)
        await turn.acquire()  # at once: nobody wants it
        try:
            await self._evict(name, turn, reason)
        except ConflictError:
            return False
        return True

    async def evict_used(self, name: str) -> None:
        """Evicts a resident model for others' sake, once its running requests have ended.

        Requests that come meanwhile wait, and bring it back. A cancelled wait cancels nothing.

        Args:
            name: Of a model that `is_only_used`, on which nobody leans.

        Raises:
            LinkerError: It stays: the engine ended, or it needs the model.
        """
        assert self.is_only_used(name)
        turn = self._catalog.turn(name)
        await turn.acquire()  # at once: nobody wants it
        await self._evict(name, turn, EvictionReason.CAPACITY)

    async def unload(self, name: str) -> None:
        """Evicts a model on request, pinned or not, once its running requests have ended.

        Requests that come meanwhile wait, and bring it back. A cancelled wait cancels nothing.

        Args:
            name: A model's, not an alias. One that is unloaded already is left so.

        Raises:
            ModelNotFoundError: There is none of that name.
            ConflictError: It is the donor of resident models, or not ready.
            NotReadyError: It is on its way back, or the engine is.
        """
        turn = self._catalog.turn(name)
        await turn.acquire()
        try:
            resident = self._check_ready(name)
        except LinkerError:
            turn.release()
            raise
        if not resident:
            turn.release()
            return
        await self._evict(name, turn, EvictionReason.REQUEST)
        try:
            await self._rows.write_later()
        except NotReadyError as error:
            logger.warning("that %s is unloaded is not stored yet: %s", name, error.message)

    def note_request(self, name: str) -> None:
        """Counts a model that has left on request, though not through here."""
        self._metrics.evicted(EvictionReason.REQUEST)
        logger.info("model %s is unloaded (%s)", name, EvictionReason.REQUEST.value)

    def is_leaving(self, name: str) -> bool:
        """Whether a model is closed to requests on its way out; asked for, it comes back."""
        return name in self._leaving

    def is_idle(self, name: str) -> bool:
        """Whether nothing but models that lean on it keeps a resident model from being evicted."""
        return self._is_free(name) and not self._catalog.num_leases(name)

    def is_only_used(self, name: str) -> bool:
        """Whether requests, and models that lean on it, are all that keeps a model here."""
        return self._is_free(name) and self._catalog.num_leases(name) > 0

    def _is_free(self, name: str) -> bool:
        record = self._rows.find(name)
        return (
            self._catalog.get(name) is not None
            and record is not None
            and record.state is ModelState.READY  # not about to be stored as that
            and not record.pinned
            and not self._catalog.turn(name).wanted
        )

    async def settled(self) -> None:
        """Waits until the evictions of models without requests that were begun have ended."""
        while self._unused:
            await asyncio.wait(self._unused)

    async def stop(self) -> None:
        """Ends what still waits for requests to end."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _check_ready(self, name: str) -> bool:
        """Whether a model is resident, and may be unloaded."""
        record = self._rows.named(name)
        if self._catalog.get(name) is None:
            if record.state is ModelState.UNLOADED:
                return False
            if record.state is ModelState.READY:
                raise NotReadyError(f"The model {name!r} is on its way back; try again then.")
            raise ConflictError(
                f"The model {name!r} is {record.state.value}; only a ready one is unloaded."
            )
        if record.state is ModelState.ONBOARDING:
            raise ConflictError(f"The model {name!r} is being onboarded; unload it then.")
        models = (self._rows.model_of(one) for one in self._catalog.dependants(name))
        if dependants := list(dict.fromkeys(models)):
            raise ConflictError(
                f"The model {name!r} is the donor of {', '.join(dependants)}, which are resident; "
                "unload those first, or let one of them take its place with rehome=true."
            )
        return True

    async def _evict(self, name: str, turn: Turn, reason: EvictionReason) -> None:
        """Evicts a resident model; takes over its turn."""
        served = self._catalog.get(name)
        assert served is not None
        self._catalog.park(name)
        self._leaving.add(name)
        task = asyncio.ensure_future(self._take_out(served, turn, reason))
        for tasks in (self._running, *([] if self._catalog.num_leases(name) else [self._unused])):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        task.add_done_callback(_note_failure)
        await asyncio.shield(task)

    async def _take_out(self, served: ServedModel, turn: Turn, reason: EvictionReason) -> None:
        name = served.name
        try:
            await self._catalog.until_unused(name)
            await self._engine().unload(name)
        except (EngineFailureError, NotReadyError):
            raise  # its row still says ready, so the next engine gets it
        except LinkerError:
            if self._catalog.dormant(name) is served:
                self._catalog.publish(served)  # somebody leans on it: it stays
            raise
        else:
            record = self._rows.find(name)
            if record is not None and record.state is ModelState.READY:  # not deleted meanwhile
                self._rows.amend(name, state=ModelState.UNLOADED)
            self._metrics.evicted(reason)
            logger.info("model %s is unloaded (%s)", name, reason.value)
        finally:
            self._leaving.discard(name)
            turn.release()


def _note_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.info("a model was not unloaded: %s", error)
