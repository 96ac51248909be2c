"""The worker that makes and checks delta folders, as the server meets it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from linker_core.errors import EngineFailureError, InsufficientCapacityError, NotReadyError
from linker_core.residency.encoding_memory import encoding_bytes
from linker_core.sharing.plan import SharePlan
from linker_core.weights.checkpoint import Checkpoint, Identity
from server.onboarding.processes import OnStageProgress, never_busy, run_worker
from server.residency.room import Room

logger = logging.getLogger(__name__)

ENCODE_COMMAND = (sys.executable, "-P", "-m", "linker_core.residency.worker")


class Encoder:
    """Starts encoding workers and reads what they say. Cancelling a wait kills the worker.

    Args:
        command: The worker's command line.
        busy: Whether sequences run now; the worker holds back while they do.
        room: Lends the encoder its memory; None where host memory is not the engine's.
    """

    def __init__(
        self,
        command: Sequence[str] = ENCODE_COMMAND,
        *,
        busy: Callable[[], bool] = never_busy,
        room: Room | None = None,
    ) -> None:
        self._command = command
        self._busy = busy
        self._room = room
        self._numbers = itertools.count()

    async def encode(
        self,
        plan: SharePlan,
        *,
        donor: Path,
        variant: Path,
        target: Path,
        on_progress: OnStageProgress,
    ) -> None:
        """Writes what a plan keeps of a variant into a new folder.

        Raises:
            InsufficientCapacityError: The disk is full, or the engine has no room for the encoder.
            LinkerError: What the worker says, or why it died; see `run_worker`.
        """
        request = {
            "task": "encode",
            "donor": str(donor),
            "variant": str(variant),
            "plan": plan.to_json(),
            "target": str(target),
        }
        nbytes = await asyncio.to_thread(_bytes_for, plan, donor, variant)
        async with self._reserved(nbytes):
            await self._run(request, on_progress)

    async def convert(
        self,
        adapter: Path,
        *,
        donor: Path,
        donor_fingerprint: str,
        target: Path,
        on_progress: OnStageProgress,
    ) -> None:
        """Writes what a LoRA adapter changes of its base into a new folder.

        Raises:
            LinkerError: See `encode`; or the adapter does not fit the donor.
        """
        request = {
            "task": "adapter",
            "donor": str(donor),
            "donor_fingerprint": donor_fingerprint,
            "adapter": str(adapter),
            "target": str(target),
        }
        await self._run(request, on_progress)

    async def verify(self, delta: Path, *, donor: Path, on_progress: OnStageProgress) -> Identity:
        """Reads a delta folder to its end; returns what its file was then.

        Raises:
            BadCheckpointError: Its content is not what its header says, is not finite, or does not
                fit the donor.
            LinkerError: Why the worker died; see `run_worker`.
        """
        request = {"task": "verify", "delta": str(delta), "donor": str(donor)}
        result = await self._run(request, on_progress)
        return tuple(tuple(entry) for entry in result["identity"])

    @asynccontextmanager
    async def _reserved(self, nbytes: int) -> AsyncIterator[None]:
        """Sets memory aside as long as the engine of the moment lives; without one there is none.

        Raises:
            InsufficientCapacityError: It has no room.
        """
        name, what = f"encoder-{next(self._numbers)}", "Encoding the delta"
        lender = None if self._room is None else self._room.client()
        async with AsyncExitStack() as stack:
            if self._room is not None and lender is not None:
                try:
                    await stack.enter_async_context(
                        self._room.reserving(lender, name, nbytes, what=what)
                    )
                except InsufficientCapacityError as error:
                    raise InsufficientCapacityError(
                        f"{error.message} Policies exact and thresholds need no encoding.",
                        retry_after_s=error.retry_after_s,
                    ) from error
                except (EngineFailureError, NotReadyError):
                    if not lender.closed.is_set():
                        raise
                    logger.info("the engine ended; the encoder runs beside the next one's start")
            yield

    async def _run(
        self, request: Mapping[str, Any], on_progress: OnStageProgress
    ) -> Mapping[str, Any]:
        return await run_worker(
            self._command, request=request, busy=self._busy, on_progress=on_progress
        )


def _bytes_for(plan: SharePlan, donor: Path, variant: Path) -> int:
    with Checkpoint.open(donor) as base, Checkpoint.open(variant) as fine:
        return encoding_bytes(plan, base.tensors, fine.tensors)
