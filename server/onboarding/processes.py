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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    from_record,
)
from linker_core.lifeline import stop_signals_blocked
from linker_core.pace import BUSY_LINE, IDLE_LINE

logger = logging.getLogger(__name__)

OnStageProgress = Callable[[str, int, int], None]  # stage, done, in all

_MAX_LINE_BYTES = 256 * 1024**2  # a report holds every tensor of a model
_BUSY_POLL_S = 0.1
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # a heap for each thread would be most of a scan's memory
    "OMP_WAIT_POLICY": "PASSIVE",
}


def worker_environment() -> dict[str, str]:
    """Returns the environment workers run in; what the user set comes first."""
    return _ENVIRONMENT | os.environ


def never_busy() -> bool:
    """Says that no sequence runs, where there is no engine to ask."""
    return False


async def run_worker(
    command: Sequence[str],
    *,
    request: Mapping[str, Any] | None = None,
    busy: Callable[[], bool] = never_busy,
    on_progress: OnStageProgress,
) -> Mapping[str, Any]:
    """Returns a worker's result. Cancelling the wait kills the worker.

    Args:
        command: Its command line.
        request: Goes in as the first JSON line of its stdin, if it takes one.
        busy: Whether sequences run now. Asked ten times a second; each change goes in as a line
            "busy" or "idle" (`linker_core.pace.Pace.follow`).
        on_progress: Hears of each progress line.

    Raises:
        LinkerError: What the worker says, or why it died: `BadCheckpointError` if a file was cut
            short, `InsufficientCapacityError` if it was killed, else `EngineFailureError`.
    """
    with stop_signals_blocked():
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            env=worker_environment(),
        )
    assert process.stdin is not None
    assert process.stdout is not None
    speaking = asyncio.ensure_future(_speak(process.stdin, request, busy))
    try:
        result = await _read_result(process.stdout, on_progress)
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
    return EngineFailureError(
        "The process that read the model failed through a fault of the server; see its log."
    )


async def _speak(
    stdin: asyncio.StreamWriter, request: Mapping[str, Any] | None, busy: Callable[[], bool]
) -> None:
    """Writes the request, then every change of `busy`, until cancelled or the worker is gone."""
    said = False
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if request is not None:
            stdin.write(json.dumps(request).encode() + b"\n")
            await stdin.drain()
        while True:
            if (now := busy()) != said:
                stdin.write((BUSY_LINE if now else IDLE_LINE).encode() + b"\n")
                await stdin.drain()
                said = now
            await asyncio.sleep(_BUSY_POLL_S)


async def _read_result(
    stdout: asyncio.StreamReader, on_progress: OnStageProgress
) -> Mapping[str, Any] | None:
    """Follows the worker's lines up to its result; None if it ends without one."""
    while line := await stdout.readline():
        try:
            message = json.loads(line)
        except ValueError:
            return None  # cut off in the middle of a line
        if "error" in message:
            raise from_record(message["error"])
        if "result" in message:
            result: Mapping[str, Any] = message["result"]
            return result
        on_progress(message["stage"], message["done_bytes"], message["total_bytes"])
    return None
