"""Disposable worker processes: one request in, JSON lines out, told when sequences run.

They read files that nobody here trusts; whatever those do to a worker, only that process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    NotReadyError,
    from_record,
)
from linker_core.lifeline import stop_signals_blocked
from linker_core.pace import BUSY_LINE, IDLE_LINE

logger = logging.getLogger(__name__)

OnStageProgress = Callable[[str, int, int], None]  # stage, done, in all
OnSaid = Callable[[Mapping[str, Any]], None]

_MAX_LINE_BYTES = 256 * 1024**2  # a report holds every tensor of a model
_BUSY_POLL_S = 0.1
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # a heap for each thread would be most of a scan's memory
    "OMP_WAIT_POLICY": "PASSIVE",
}


def worker_environment() -> dict[str, str]:
    """Returns the environment workers run in; what the user set comes first."""
    return _ENVIRONMENT | os.environ


def _unheard(message: Mapping[str, Any]) -> None:
    raise ValueError(f"a worker says what nobody listens to: {', '.join(message)}")


def never_busy() -> bool:
    """Says that no sequence runs, where there is no engine to ask."""
    return False


async def run_worker(
    command: Sequence[str],
    *,
    request: Mapping[str, Any] | None = None,
    more: Iterable[bytes] = (),
    busy: Callable[[], bool] = never_busy,
    on_progress: OnStageProgress,
    on_said: OnSaid = _unheard,
    environment: Mapping[str, str] | None = None,
) -> Mapping[str, Any]:
    """Returns a worker's result. Cancelling the wait kills the worker.

    Args:
        command: Its command line.
        request: Goes in as the first JSON line of its stdin, if it takes one.
        more: Go in after it, a line each; asked for when the last has gone, so that none need wait
            in memory.
        busy: Whether sequences run now. Asked ten times a second; each change goes in as a line
            "busy" or "idle" (`linker_core.pace.Pace.follow`).
        on_progress: Hears of each progress line.
        on_said: Hears of each other line before the result; what it raises ends the worker, a
            `KeyError`, `TypeError` or `ValueError` as what the worker should not have said.
        environment: What it needs beside `worker_environment`; what the user set comes first.

    Raises:
        NotReadyError: The system starts no process now.
        LinkerError: What the worker says, or why it died: `BadCheckpointError` if a file was cut
            short, `InsufficientCapacityError` if it was killed, else `EngineFailureError`, also
            where it speaks otherwise than agreed.
    """
    process = await _started(command, {**(environment or {}), **worker_environment()})
    assert process.stdin is not None
    assert process.stdout is not None
    speaking = asyncio.ensure_future(_speak(process.stdin, request, more, busy))
    try:
        result = await _read_result(process.stdout, on_progress, on_said)
        if result is None:
            status = await process.wait()
    finally:
        speaking.cancel()
        # Before anything is waited for: a wait can be cancelled a second time.
        if process.returncode is None:  # with a result there is nothing left for it to do
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(speaking, return_exceptions=True)
        await process.wait()
    if result is None:
        logger.warning("%s ended with status %d and no result", " ".join(command), status)
        raise _why_it_died(status)
    return result


async def _started(
    command: Sequence[str], environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    try:
        with stop_signals_blocked():
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_MAX_LINE_BYTES,
                env=environment,
            )
    except (OSError, RuntimeError) as error:  # the latter where no thread can be started
        logger.error("no worker can be started: %s", error)
        raise NotReadyError(
            "The server can start no process to read the model; try again in a moment."
        ) from error


def _why_it_died(status: int) -> LinkerError:
    """Returns whose fault it is that a worker ended without a result."""
    if status == -signal.SIGBUS:  # what reading beyond the end of a mapped file gives
        return BadCheckpointError(
            "The checkpoint could not be read to its end: a file changed or was cut short "
            "while it was being read. Copy the model again and retry."
        )
    if status == -signal.SIGKILL:  # what the system gives when it has no memory left
        return InsufficientCapacityError(
            "The process that read the model was killed, most likely because the machine has no "
            "memory left. Unload a model, or give the server more memory, and retry."
        )
    return worker_fault()


def worker_fault() -> EngineFailureError:
    """Returns what is said of a worker that fails through no fault of the files."""
    return EngineFailureError(
        "The process that read the model failed through a fault of the server; see its log."
    )


async def _speak(
    stdin: asyncio.StreamWriter,
    request: Mapping[str, Any] | None,
    more: Iterable[bytes],
    busy: Callable[[], bool],
) -> None:
    """Writes the request with its lines, then every change of `busy`.

    Until cancelled, or the worker is gone.
    """
    said = False
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if request is not None:
            stdin.write(json.dumps(request).encode() + b"\n")
            await stdin.drain()
        for line in more:
            stdin.write(line + b"\n")
            await stdin.drain()
        while True:
            if (now := busy()) != said:
                stdin.write((BUSY_LINE if now else IDLE_LINE).encode() + b"\n")
                await stdin.drain()
                said = now
            await asyncio.sleep(_BUSY_POLL_S)


async def _read_result(
    stdout: asyncio.StreamReader, on_progress: OnStageProgress, on_said: OnSaid
) -> Mapping[str, Any] | None:
    """Follows the worker's lines up to its result; None if it ends without one.

    Raises:
        LinkerError: What the worker says, or `EngineFailureError` where that cannot be understood.
    """
    try:
        while (line := await stdout.readline()).endswith(b"\n"):  # else it was cut off
            message = json.loads(line)
            if "error" in message:
                raise from_record(message["error"])
            if "result" in message:
                result: Mapping[str, Any] = message["result"]
                return result
            if "stage" in message:
                on_progress(message["stage"], message["done_bytes"], message["total_bytes"])
            else:
                on_said(message)
    except (KeyError, TypeError, ValueError) as error:
        logger.error("a worker was not understood: %.200s", error)
        raise worker_fault() from error
    return None
