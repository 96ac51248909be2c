"""Keeps an engine process running: readiness from its heartbeat, restarts after its death.

Readiness follows progress: an engine whose counter stands still is not ready, one that stays
still is killed, and one that keeps dying ends the server rather than looping for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from linker_core.config import UNUSABLE_DEVICE_STATUS, EngineConfig
from linker_core.engine.messages import Snapshot
from linker_core.errors import EngineFailureError, NotReadyError
from server.bridge.client import EngineClient
from server.bridge.process import ENGINE_COMMAND, EngineProcess

logger = logging.getLogger(__name__)

_MAX_LATE_POLLS = 2  # a look at the heartbeat that comes later than that counts as if it had not


class EngineState(StrEnum):
    """Where the engine stands."""

    STARTING = "starting"
    RUNNING = "running"
    STALLED = "stalled"
    DOWN = "down"
    GIVEN_UP = "given_up"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionLimits:
    """How long is too long, in seconds, and how often is too often."""

    poll_s: float = 0.25
    start_s: float = 300.0  # importing torch from a cold disk takes a while
    # Then the server is not ready. Within five seconds: the first look may still find the last beat
    # new, and the one that makes the time full is not late enough.
    stall_s: float = 4.5
    stall_kill_s: float = 60.0  # then the engine is killed
    dead_s: float = 420.0  # without a beat, restarts included; then the server is not alive
    backoff_s: float = 0.2  # doubles with every crash in the window
    crash_window_s: float = 300.0
    max_crashes: int = 5  # in the window; one more gives up
    stop_s: float = 5.0


OnRunning = Callable[[EngineClient], Awaitable[None]]


class EngineSupervisor:
    """Runs the engine, over and over if need be.

    Args:
        config: Handed to the engine process.
        on_running: Called with every new engine once it reads commands; loads the models.
        on_down: Called when an engine is gone, before the next one starts.
        command: The engine's command line without its options.
        limits: The supervision's times and counts.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_running: OnRunning,
        on_down: Callable[[], None],
        command: Sequence[str] = ENGINE_COMMAND,
        limits: SupervisionLimits | None = None,
    ) -> None:
        self._config = config
        self._on_running = on_running
        self._on_down = on_down
        self._command = command
        self._limits = limits or SupervisionLimits()
        self._crashes: deque[float] = deque()
        self._process: EngineProcess | None = None
        self._client: EngineClient | None = None
        self._beat_at = time.monotonic()  # or when there began to be one to wait for
        self.state = EngineState.STARTING
        self.num_starts = 0  # of engine processes
        self.given_up = asyncio.Event()

    @property
    def is_alive(self) -> bool:
        """Whether the engine works, or may yet: it has not stood still for too long.

        False is for whoever restarts the whole server; `state` says whether it may be used.
        """
        silent_s = time.monotonic() - self._beat_at
        return self.state is not EngineState.GIVEN_UP and silent_s <= self._limits.dead_s

    @property
    def client(self) -> EngineClient:
        """The engine to talk to.

        Raises:
            NotReadyError: There is none at the moment.
        """
        if self._client is None or self._client.closed.is_set():
            msg = "The engine is not running; it is being started."
            raise NotReadyError(msg)
        return self._client

    @property
    def serving_client(self) -> EngineClient:
        """The engine to send requests to.

        Raises:
            NotReadyError: There is none, or it makes no progress.
        """
        if self.state is not EngineState.RUNNING:
            msg = f"The engine is {self.state.value}; try again in a moment."
            raise NotReadyError(msg)
        return self.client

    @property
    def snapshot(self) -> Snapshot | None:
        """The engine's last report, None while there is no engine."""
        return None if self._client is None else self._client.snapshot

    @property
    def pid(self) -> int | None:
        """The engine's process id, None while there is none."""
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Supervises until cancelled or until another start would be in vain (`given_up`)."""
        try:
            while await self._may_start():
                status = await self._run_once()
                self.state = EngineState.DOWN
                if status == UNUSABLE_DEVICE_STATUS:
                    break  # the engine has said why
            else:
                logger.error("the engine died too often; giving up")
            self.state = EngineState.GIVEN_UP
            self.given_up.set()
        finally:
            if self.state is not EngineState.GIVEN_UP:
                self.state = EngineState.STOPPED

    def kill(self) -> None:
        """Ends the engine process now, for a server that leaves without waiting."""
        if self._process is not None:
            self._process.kill()

    def fail_all(self, message: str) -> None:
        """Ends every request in flight with `EngineFailureError`."""
        if self._client is not None:
            self._client.fail_all(message)

    async def _may_start(self) -> bool:
        now = time.monotonic()
        while self._crashes and self._crashes[0] < now - self._limits.crash_window_s:
            self._crashes.popleft()
        if len(self._crashes) > self._limits.max_crashes:
            return False
        if self._crashes:
            await asyncio.sleep(self._limits.backoff_s * 2 ** (len(self._crashes) - 1))
        return True

    async def _run_once(self) -> int | None:
        """Starts one engine and returns its exit status when it is gone; None: it never came."""
        self.state = EngineState.STARTING
        is_ordered = False
        try:
            process = self._process = await EngineProcess.spawn(self._command, self._config)
        except (OSError, RuntimeError) as error:  # the latter where no thread can be started
            logger.error("no engine can be started: %s", error)
            self._crashes.append(time.monotonic())
            return None
        self.num_starts += 1
        client = self._client = EngineClient(process.connection)
        running: asyncio.Task[None] | None = None
        try:
            if await self._starts(client):
                self.state = EngineState.RUNNING
                logger.info("engine %d is running", process.pid)
                running = asyncio.ensure_future(self._on_running(client))
                running.add_done_callback(_log_failure)
                await self._watch(process, client)
            self._crashes.append(time.monotonic())
        except asyncio.CancelledError:  # the server stops
            is_ordered = not client.closed.is_set()
            raise
        finally:
            # One that has hung up is leaving; its status says why. The others obey if they can.
            leaves = client.closed.is_set() or self.state is EngineState.RUNNING
            if self.state is not EngineState.STOPPED:
                self.state = EngineState.DOWN
            client.shut_down()
            client.fail_all("The engine stopped before it could finish; try again in a moment.")
            self._on_down()
            if running is not None:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            grace_s = self._limits.stop_s if leaves else 0.0
            await process.close(grace_s=grace_s)
            status = await process.wait()
            _say_end(process.pid, status, is_ordered=is_ordered, grace_s=grace_s)
            self._client = self._process = None
        return status

    async def _starts(self, client: EngineClient) -> bool:
        try:
            async with asyncio.timeout(self._limits.start_s):
                await asyncio.shield(client.ready)
        except TimeoutError:
            logger.error("the engine did not start within %.0f s", self._limits.start_s)
            return False
        except EngineFailureError:
            logger.warning("the engine ended before it was ready")
            return False
        return True

    async def _watch(self, process: EngineProcess, client: EngineClient) -> None:
        """Follows the heartbeat until the engine is gone or has to go.

        Only time in which it was looked at counts: a server that stood still itself, or a machine
        that did, says nothing about the engine.
        """
        beat, looked_at, still_s = process.heartbeat(), time.monotonic(), 0.0
        while not client.closed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.poll_s):
                    await client.closed.wait()
            now = time.monotonic()
            still_s += min(now - looked_at, _MAX_LATE_POLLS * self._limits.poll_s)
            looked_at = now
            if process.heartbeat() != beat:
                beat, still_s, self._beat_at = process.heartbeat(), 0.0, now
                self.state = EngineState.RUNNING
            elif still_s > self._limits.stall_kill_s:
                logger.error("the engine stood still for %.0f s; killing it", still_s)
                return
            elif still_s > self._limits.stall_s and self.state is EngineState.RUNNING:
                logger.warning("the engine stands still")
                self.state = EngineState.STALLED


def _say_end(pid: int, status: int, *, is_ordered: bool, grace_s: float) -> None:
    """Logs how an engine ended; one that only starts obeys no order, and is killed at once."""
    if not is_ordered:
        logger.warning("engine %d ended with status %d", pid, status)
    elif grace_s and status == -signal.SIGKILL:
        logger.warning("engine %d did not leave within %.0f s and was killed", pid, grace_s)
    else:
        logger.info("engine %d stopped", pid)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("loading the models failed", exc_info=task.exception())
