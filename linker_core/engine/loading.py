"""The queue of models to load: one at a time, a bounded slice between two steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

from linker_core.engine.messages import Event, LoadFailed, LoadModel, LoadProgress, ModelLoaded
from linker_core.engine.resident_model import ResidentModel
from linker_core.engine.residents import Residents
from linker_core.errors import (
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    NotReadyError,
)
from linker_core.residency.device import is_lack_of_memory

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Active:
    """The model that is being loaded, and how long that took inside the slices."""

    message: LoadModel
    progress: Generator[int | None, None, ResidentModel]
    opened: bool = False  # past the first yield, which moved no byte
    bound: bool = False  # past the first None, which moved none either
    total_bytes: int = 0  # to be moved, once it is opened
    alias_s: float = 0.0
    move_s: float = 0.0
    first_token_s: float = 0.0

    def count(self, seconds: float, done_bytes: int | None) -> None:
        """Books the time of one advance that ended in a yield, or in the return."""
        if self.bound:
            self.first_token_s += seconds
        elif self.opened and done_bytes is not None:
            self.move_s += seconds
        else:
            self.alias_s += seconds
        self.opened = True
        self.bound = done_bytes is None


class LoadQueue:
    """Loads models in the order in which they were asked for.

    Args:
        residents: Where they go.
        clock: Monotonic seconds.
    """

    def __init__(self, residents: Residents, *, clock: Callable[[], float]) -> None:
        self._residents = residents
        self._clock = clock
        self._queued: deque[LoadModel] = deque()
        self._active: _Active | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return self._active is not None or bool(self._queued)

    def add(self, message: LoadModel) -> None:
        """Queues a model."""
        self._queued.append(message)

    def pending(self) -> list[LoadModel]:
        """Returns what is being loaded or waits for it."""
        active = [] if self._active is None else [self._active.message]
        return [*active, *self._queued]

    def rehome(self, donor: str, heir: str) -> None:
        """Lets what waits for a donor be loaded into its heir's family, which is the same one."""
        if self._active is not None and self._active.message.donor == donor:
            self._active.message = replace(self._active.message, donor=heir)
        self._queued = deque(
            replace(message, donor=heir) if message.donor == donor else message
            for message in self._queued
        )

    def cancel(self, model: str) -> list[Event]:
        """Forgets a model that is not loaded yet; what was moved of it is given back."""
        messages = [message for message in self.pending() if message.model == model]
        if self._active is not None and self._active.message.model == model:
            self._active.progress.close()
            self._active = None
        self._queued = deque(message for message in self._queued if message.model != model)
        error = NotReadyError(f"The loading of model '{model}' was cancelled.")
        return [LoadFailed(model=model, error=error.to_record()) for _ in messages]

    def advance(self, slice_s: float) -> list[Event]:
        """Works for about `slice_s` seconds and says how far it came; ends after one model."""
        active = self._active or self._start_next()
        if active is None:
            return []
        now_s = self._clock()
        deadline_s = now_s + slice_s
        try:
            while True:
                before_s = now_s
                done_bytes = next(active.progress)
                if not active.opened:
                    active.total_bytes = self._residents.pool.budget.arriving_bytes()
                now_s = self._clock()
                active.count(now_s - before_s, done_bytes)
                if done_bytes is None:
                    return []  # the next step may be what it waits for
                if now_s >= deadline_s:
                    break
        except StopIteration as end:
            active.count(self._clock() - before_s, None)
            self._active = None
            return [self._loaded(end.value, active)]
        except Exception as error:  # noqa: BLE001 - the edge of a job: its fault ends it alone
            self._active = None
            return [_failed(active.message, error)]
        model, total_bytes = active.message.model, active.total_bytes
        return [LoadProgress(model=model, done_bytes=done_bytes, total_bytes=total_bytes)]

    def _start_next(self) -> _Active | None:
        if not self._queued:
            return None
        served = self._residents.served.get(self._queued[0].model)
        if served is not None and served.unloading:
            return None  # the name is free again when its sequences have ended
        message = self._queued.popleft()
        self._active = _Active(message, self._residents.load(message))
        return self._active

    def _loaded(self, served: ResidentModel, active: _Active) -> ModelLoaded:
        return ModelLoaded(
            model=served.name,
            bytes=self._residents.bytes_of(served.name),
            max_model_len=served.max_model_len,
            alias_seconds=active.alias_s,
            move_seconds=active.move_s,
            first_token_seconds=active.first_token_s,
        )


def _failed(message: LoadModel, error: Exception) -> LoadFailed:
    if isinstance(error, LinkerError):
        known = error
    elif isinstance(error, MemoryError | RuntimeError) and is_lack_of_memory(error):
        known = InsufficientCapacityError(
            f"The device ran out of memory while loading model '{message.model}'. "
            "Unload another model, or set a memory budget."
        )
    else:
        _log.error("loading model %r failed", message.model, exc_info=error)
        known = EngineFailureError(
            f"The engine failed while loading model '{message.model}'. See the server's log."
        )
    return LoadFailed(model=message.model, error=known.to_record())
