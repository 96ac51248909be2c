"""The asynchronous side of one engine process: commands out, events in. Knows no HTTP.

All of it belongs to the event loop, which never waits for the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeVar, cast

from linker_core.engine.messages import (
    Abort,
    CancelLoad,
    Command,
    EngineReady,
    Event,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    ModelUnloaded,
    Release,
    RequestFailed,
    Reserve,
    Reserved,
    ReserveFailed,
    SamplingParams,
    Shutdown,
    Snapshot,
    StepOutput,
    Submit,
    TokenOutput,
    UnloadFailed,
    UnloadModel,
)
from linker_core.errors import EngineFailureError, LinkerError, from_record
from server.bridge.channel import Channel
from server.bridge.mailbox import Mailbox

logger = logging.getLogger(__name__)

# A reader this many tokens behind has stopped reading; its sequence is ended.
MAX_UNREAD_TOKENS = 8192

OnProgress = Callable[[int, int], None]
_Value = TypeVar("_Value")


class EngineClient:
    """Talks to one engine process until the connection closes.

    Args:
        connection: The server's end of the channel; the client owns it from here on.

    Attributes:
        snapshot: The engine's last report, once there is one.
        ready: What the engine says when it has come up.
        closed: Set once the engine is gone.
        lost_loads: The models that it was loading when it was given up.
    """

    def __init__(self, connection: Connection) -> None:
        self._loop = asyncio.get_running_loop()
        self._mailboxes: dict[str, Mailbox] = {}
        self._loads: dict[str, asyncio.Future[ModelLoaded]] = {}
        self._unloads: dict[str, asyncio.Future[None]] = {}
        self._reservations: dict[str, asyncio.Future[None]] = {}
        self._on_progress: dict[str, OnProgress] = {}
        self.snapshot: Snapshot | None = None
        self.lost_loads: set[str] = set()
        self.ready: asyncio.Future[EngineReady] = self._loop.create_future()
        self.closed = asyncio.Event()
        self._channel = Channel(
            connection,
            on_message=lambda message: self._on_event(cast(Event, message)),
            on_closed=self._on_closed,
        )

    async def submit(
        self,
        request_id: str,
        model: str,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        start_within_s: float | None = None,
    ) -> AsyncGenerator[tuple[list[TokenOutput], list[float]], None]:
        """Generates one sequence; yields the tokens that have come since, most often one.

        Beside them stands when each came from the engine, in monotonic seconds: a reader may be
        late. Closing the iterator early aborts the sequence.

        Args:
            request_id: Unique among running sequences.
            model: Resident.
            prompt_ids: At least one.
            sampling: How tokens are chosen.
            priority: Smaller is sooner.
            cache_salt: Prefixes are shared among sequences of the same salt alone.
            tenant: Whose it is; tenants have equal shares.
            start_within_s: How long it may wait for its first step; None: for ever.

        Raises:
            LinkerError: The sequence failed, or the engine died.
        """
        self._check_open()
        mailbox = self._mailboxes[request_id] = Mailbox(MAX_UNREAD_TOKENS)
        self._put(
            Submit(
                request_id=request_id,
                model=model,
                prompt_ids=prompt_ids,
                sampling=sampling,
                priority=priority,
                cache_salt=cache_salt,
                tenant=tenant,
                start_within_s=start_within_s,
                submitted_s=time.monotonic(),
            )
        )
        finished = False
        try:
            while not finished:
                taken = await mailbox.take()
                finished = taken[0][-1].finish_reason is not None
                yield taken
        finally:
            self._mailboxes.pop(request_id, None)
            if not finished:
                self._put(Abort(request_id=request_id))

    async def load(
        self, command: LoadModel, *, on_progress: OnProgress | None = None
    ) -> ModelLoaded:
        """Makes a model resident and waits until it is.

        A cancelled wait withdraws the model and ends when that is done: the engine is as it was
        before. Only a model that has replaced another by then stays, and the wait ends well.

        Raises:
            LinkerError: It could not be loaded; the engine is as it was before.
        """
        self._check_open()
        assert command.model not in self._loads
        future: asyncio.Future[ModelLoaded] = self._loop.create_future()
        self._loads[command.model] = future
        if on_progress is not None:
            self._on_progress[command.model] = on_progress
        self._put(command)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._put(CancelLoad(model=command.model))
            await asyncio.wait({future})  # who was quicker
            if future.exception() is None:
                if command.replaces:
                    return future.result()
                with contextlib.suppress(EngineFailureError):
                    await self.unload(command.model)
            raise
        finally:
            self._loads.pop(command.model, None)
            self._on_progress.pop(command.model, None)

    async def unload(self, model: str, *, heir: str | None = None) -> None:
        """Takes a model out of the engine, after its running sequences; see `unloading`.

        Raises:
            LinkerError: Other models lean on it, or the engine died meanwhile.
        """
        await self.unloading(model, heir=heir)

    def unloading(self, model: str, *, heir: str | None = None) -> Awaitable[None]:
        """Asks for a model's unloading at once; whoever awaits the result waits for its end.

        Args:
            model: Takes no requests from here on; what is not resident is no error.
            heir: Resident, and its family's donor for every command that follows.

        Raises:
            EngineFailureError: The engine is gone.
        """
        self._check_open()
        future = self._unloads.get(model)
        if future is None:
            future = self._unloads[model] = self._loop.create_future()
            self._put(UnloadModel(model=model, heir=heir))
        return asyncio.shield(future)

    async def reserve(self, name: str, nbytes: int) -> None:
        """Sets memory of the engine's device aside for another process, until `release`.

        A cancelled wait gives it back. The engine's end ends the reservation.

        Args:
            name: Unique among reservations.
            nbytes: How much.

        Raises:
            InsufficientCapacityError: It does not fit.
            EngineFailureError: The engine is gone.
        """
        self._check_open()
        assert name not in self._reservations
        future: asyncio.Future[None] = self._loop.create_future()
        self._reservations[name] = future
        self._put(Reserve(name=name, nbytes=nbytes))
        try:
            await future
        except asyncio.CancelledError:
            self.release(name)
            raise
        finally:
            del self._reservations[name]

    def release(self, name: str) -> None:
        """Gives a reservation back; harmless when the engine is gone."""
        self._put(Release(name=name))

    def fail(self, request_id: str, error: LinkerError) -> None:
        """Ends a sequence: its reader gets the tokens that are there, then the error."""
        mailbox = self._mailboxes.get(request_id)
        if mailbox is not None:
            mailbox.fail(error)

    def fail_all(self, message: str) -> None:
        """Ends everything that waits for the engine with `EngineFailureError`, now."""
        for mailbox in self._mailboxes.values():
            mailbox.fail(EngineFailureError(message))
        self.lost_loads |= {name for name, load in self._loads.items() if not load.done()}
        waits: list[asyncio.Future[Any]] = [
            *self._loads.values(),
            *self._unloads.values(),
            *self._reservations.values(),
        ]
        for future in (*waits, self.ready):
            if not future.done():
                future.set_exception(EngineFailureError(message))
                future.exception()  # retrieved: nobody may be waiting for it

    def shut_down(self) -> None:
        """Asks the engine to leave."""
        self._put(Shutdown())

    # --- event loop ---------------------------------------------------------------------------

    def _put(self, command: Command) -> None:
        self._channel.send(command)

    def _check_open(self) -> None:
        if self.closed.is_set():
            msg = "The engine is not running; try again in a moment."
            raise EngineFailureError(msg)

    def _on_event(self, event: Event) -> None:
        match event:
            case StepOutput():
                came_s = time.monotonic()
                for token in event.tokens:
                    self._on_token(token, came_s)
            case RequestFailed():
                mailbox = self._mailboxes.get(event.request_id)
                if mailbox is not None:
                    mailbox.fail(from_record(dict(event.error)))
            case Snapshot():
                self.snapshot = event
            case EngineReady():
                _resolve(self.ready, event)
            case Reserved():
                _resolve(self._reservations.get(event.name), None)
            case ReserveFailed():
                _reject(self._reservations.get(event.name), event.error)
            case _:
                self._on_model_event(event)

    def _on_model_event(
        self, event: LoadProgress | ModelLoaded | LoadFailed | ModelUnloaded | UnloadFailed
    ) -> None:
        match event:
            case LoadProgress():
                on_progress = self._on_progress.get(event.model)
                if on_progress is not None:
                    on_progress(event.done_bytes, event.total_bytes)
            case ModelLoaded():
                _resolve(self._loads.get(event.model), event)
            case LoadFailed():
                _reject(self._loads.get(event.model), event.error)
            case ModelUnloaded():
                _resolve(self._unloads.pop(event.model, None), None)
            case UnloadFailed():
                _reject(self._unloads.pop(event.model, None), event.error)

    def _on_token(self, token: TokenOutput, came_s: float) -> None:
        mailbox = self._mailboxes.get(token.request_id)
        if mailbox is None or mailbox.put(token, came_s):
            return
        msg = "The answer was not read fast enough and has been cut off."
        mailbox.fail(EngineFailureError(msg))
        del self._mailboxes[token.request_id]

    def _on_closed(self) -> None:
        self.closed.set()
        self.fail_all("The engine stopped before it could finish; try again in a moment.")


def _resolve(future: asyncio.Future[_Value] | None, value: _Value) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _reject(future: asyncio.Future[_Value] | None, error: Mapping[str, str | None]) -> None:
    if future is not None and not future.done():
        future.set_exception(from_record(dict(error)))
        future.exception()  # retrieved: nobody may be waiting for it
