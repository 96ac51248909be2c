"""Models by the requests that need them: the resident at once, the unloaded once they are back.

Event loop only. However many wait for a model, it is loaded once; it goes on if all of them leave.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Protocol

from linker_core.errors import (
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
)
from server.registry.records import SERVABLE, ModelRecord, ModelState
from server.residency.catalog import Catalog, ServedModel
from server.residency.pace import Pace
from server.residency.rows import Outlook, Rows

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5  # for room, if nothing is heard before
_PATIENCE_S = 1.0  # beside models whose requests never cease, until one of them is closed
# What a request for the model is answered with as it is; the rest is the model's fault, not its.
_PASSED_ON = (NotReadyError, InsufficientCapacityError, EngineFailureError, ModelNotFoundError)


class CloseOne(Protocol):
    """`Room.close_one`."""

    async def __call__(self, *, keep: frozenset[str]) -> None: ...


class Engines(Protocol):
    """What tells when the engine holds what it is to hold from its start; `Restorer` is one."""

    @property
    def is_restored(self) -> bool:
        """Whether there is an engine that does."""

    async def engine(self) -> object:
        """Waits for one that does."""


class _Return:
    """One model on its way back, and who waits for it."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = asyncio.Event()

    async def wait(self) -> None:
        """Waits until the model is resident, or raises why it is not."""
        self.num_waiting += 1
        try:
            await asyncio.shield(self._done)
        finally:
            self.num_waiting -= 1
            if not self.num_waiting:
                self._left.set()

    async def succeed(self) -> None:
        """Lets those who wait have the model; returns when each has taken it, or has left."""
        self._done.set_result(None)
        while self.num_waiting:
            self._left.clear()
            await self._left.wait()

    def fail(self, error: LinkerError) -> None:
        """Tells those who wait why there is no model."""
        if not self._done.done():
            self._done.set_exception(error)
            self._done.exception()  # retrieved: nobody may be waiting any more


class OnDemand:
    """Hands out models, and brings back those that were evicted.

    Args:
        catalog: The resident models.
        rows: The known models.
        bring_back: Loads an unloaded model after its donor, and publishes it; the model's turn is
            held. After a capacity error with `retry_after_s` it is called again.
        close_one: Takes a model that is in use away from later requests; see `Room.close_one`.
        engines: Says when a new engine holds what it is to hold; until then nobody loads.
        max_waiting: Requests that wait at once.
        timeout_s: How long each waits at most.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        rows: Rows,
        bring_back: Callable[[str], Awaitable[object]],
        close_one: CloseOne,
        engines: Engines,
        max_waiting: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._rows = rows
        self._bring_back = bring_back
        self._close_one = close_one
        self._engines = engines
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._clock = clock
        self._pace = Pace()
        self._num_waiting = 0
        self._returns: dict[str, _Return] = {}
        self._line: list[str] = []  # who waits for room, the longest first
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for models now."""
        return self._num_waiting

    @asynccontextmanager
    async def acquire(self, name: str) -> AsyncIterator[ServedModel]:
        """Yields a model that stays resident until the block ends.

        Args:
            name: A model's name or alias.

        Raises:
            ModelNotFoundError: There is none of that name.
            NotReadyError: It does not serve, or will not within the time; says when to try again.
            QueueFullError: Too many requests wait for models.
            InsufficientCapacityError: It does not fit beside what has to stay.
            EngineFailureError: The engine died on the way.
        """
        record = self._rows.named(name)
        if self._catalog.get(record.name) is None:
            await self._wait_for(record)
        with self._lease(record.name) as model:
            yield model

    def begin(self, name: str) -> None:
        """Brings an unloaded model back without waiting for it, or for room.

        Raises:
            ModelNotFoundError: There is none of that name.
            NotReadyError: It does not serve.
        """
        record = self._rows.named(name)
        if self._catalog.get(record.name) is None:
            self._join(record)

    async def stop(self) -> None:
        """Breaks off what is on its way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- waiting ------------------------------------------------------------------------------

    async def _wait_for(self, record: ModelRecord) -> None:
        """Returns when a model is resident, without a pause before whoever asked goes on."""
        if self._num_waiting >= self._max_waiting:
            raise QueueFullError("Too many requests wait for models; try again in a moment.")
        self._num_waiting += 1
        try:
            joined = self._join(record)
            expected_s = self._pace.expected_s(list(self._returns))
            if expected_s is not None and expected_s > self._timeout_s:
                raise self._too_slow(record.name, expected_s)
            async with asyncio.timeout(self._timeout_s):
                await joined.wait()
        except TimeoutError:
            raise self._too_slow(record.name, None) from None
        finally:
            self._num_waiting -= 1

    def _join(self, record: ModelRecord) -> _Return:
        """Returns a model's way back, which begins now if it has not."""
        self._check_wanted(record)
        known = self._returns.get(record.name)
        if known is None:
            known = self._returns[record.name] = _Return()
            self._pace.plan(record.name, record.plan)
            self._spawn(self._return(record.name, known))
        return known

    def _check_wanted(self, record: ModelRecord) -> None:
        """Refuses what a load would not make resident.

        A ready model that is leaving comes back once it has left. One that a new engine does not
        have yet comes back by itself; if it has not once the engine is restored, it never would.
        """
        ready = record.state is ModelState.READY
        leaving = ready and self._catalog.turn(record.name).wanted
        lost = ready and self._engines.is_restored
        if record.state is not ModelState.UNLOADED and not leaving and not lost:
            raise not_servable(record, self._rows.outlook(record.name))

    @contextmanager
    def _lease(self, name: str) -> Iterator[ServedModel]:
        if self._catalog.get(name) is None:
            raise NotReadyError(f"The model {name!r} left again; try again in a moment.")
        with self._catalog.lease(name) as model:
            yield model

    def _too_slow(self, name: str, expected_s: float | None) -> NotReadyError:
        return NotReadyError(
            f"The model {name!r} is being loaded, which takes longer than the "
            f"{self._timeout_s:g} s that a request waits; try again later.",
            retry_after_s=expected_s,
        )

    # --- coming back --------------------------------------------------------------------------

    async def _return(self, name: str, coming: _Return) -> None:
        """Brings one model back and hands it to those who wait, before anything can evict it."""
        try:
            await self._engines.engine()
            async with self._catalog.turn(name):
                await self._bring(name, coming)
                await coming.succeed()
        except LinkerError as error:
            if not coming.num_waiting:
                logger.warning("model %s was not loaded: %s", name, error.message)
            coming.fail(_for_requests(name, error))
        except asyncio.CancelledError:
            coming.fail(NotReadyError("The server is shutting down."))
            raise
        except Exception:
            logger.exception("model %s was not loaded through a fault of ours", name)
            coming.fail(EngineFailureError("Loading the model failed; see the server's log."))
        finally:
            del self._returns[name]
            self._pace.forget(name)

    async def _bring(self, name: str, coming: _Return) -> None:
        """Loads a model; waits for room as long as somebody waits for the model.

        Once one model waits for room others come after it: whoever had to leave for it does not
        come back before it.
        """
        waiting_since = self._clock()
        try:
            while self._catalog.get(name) is None:
                record = self._rows.named(name)  # as it is by now
                if record.state not in SERVABLE:
                    raise NotReadyError(f"The model {name!r} is {record.state.value} by now.")
                if self._may_try(name):
                    refusal = await self._try_to_load(name)
                    if refusal is None:
                        return
                    if refusal.retry_after_s is None or not coming.num_waiting:
                        raise refusal
                    if self._clock() - waiting_since >= _PATIENCE_S:
                        self._begin_closing(record)
                        waiting_since = self._clock()
                if name not in self._line:
                    self._line.append(name)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AGAIN_S):
                        await self._catalog.until_changed()
        finally:
            if name in self._line:
                self._line.remove(name)
                self._catalog.note_change()

    def _may_try(self, name: str) -> bool:
        """Whether a model is the first in the line, or what the first leans on.

        A donor that is asked for itself holds its turn, for which the first may be waiting.
        """
        first = self._rows.find(self._line[0]) if self._line else None
        return first is None or name in (first.name, first.donor)

    async def _try_to_load(self, name: str) -> InsufficientCapacityError | None:
        """Loads a model; returns why there is no room for it, if that is so."""
        begun = self._clock()
        try:
            await self._bring_back(name)
        except InsufficientCapacityError as error:
            return error
        self._pace.note(name, self._clock() - begun)
        return None

    def _begin_closing(self, record: ModelRecord) -> None:
        """Lets one of those in use leave for a model that has waited for long."""
        keep = frozenset({record.name} | ({record.donor} if record.donor else set()))
        self._spawn(self._close(keep))

    async def _close(self, keep: frozenset[str]) -> None:
        with suppress(LinkerError):  # it stays; the wait for room goes on
            await self._close_one(keep=keep)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def not_servable(record: ModelRecord, outlook: Outlook | None) -> NotReadyError:
    """Returns what a request for a model is told that is not resident and will not be for it.

    Args:
        record: The model.
        outlook: What becomes of it, if a job waits or runs for it.
    """
    if record.state is ModelState.FAILED:
        why = "" if record.error is None else f" {record.error['message']}"
        return NotReadyError(
            f"The model {record.name!r} has failed and will not answer by itself.{why} Onboard it "
            "again with POST /models once that is mended, or delete it."
        )
    if record.state is not ModelState.ONBOARDING or outlook is None:
        state = "coming back" if record.state is ModelState.READY else record.state.value
        return NotReadyError(f"The model {record.name!r} is {state}, so it cannot answer now.")
    remaining_s = outlook.remaining_s or None  # a stage at its end has still to be left
    if outlook.stage is None:
        how_far = "waits for its turn"
    elif remaining_s is None:
        how_far = f"is {outlook.stage.value}"
    else:
        how_far = f"is {outlook.stage.value}, for about {math.ceil(remaining_s)} s more"
    return NotReadyError(
        f"The model {record.name!r} is being onboarded, so it cannot answer now: {outlook.job_id} "
        f"{how_far}.",
        retry_after_s=remaining_s,
    )


def _for_requests(name: str, error: LinkerError) -> LinkerError:
    """Returns what a request is told; that a model's files are bad is not the request's fault."""
    if isinstance(error, _PASSED_ON):
        return error
    return NotReadyError(f"The model {name!r} could not be loaded: {error.message}")
