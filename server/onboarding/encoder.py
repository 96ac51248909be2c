"""The worker that makes and checks delta folders, as the server meets it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from linker_core.sharing.plan import SharePlan
from linker_core.weights.checkpoint import Identity
from server.onboarding.processes import OnStageProgress, never_busy, run_worker

ENCODE_COMMAND = (sys.executable, "-P", "-m", "linker_core.residency.worker")


class Encoder:
    """Starts encoding workers and reads what they say. Cancelling a wait kills the worker.

    Args:
        command: The worker's command line.
        busy: Whether sequences run now; the worker holds back while they do.
    """

    def __init__(
        self,
        command: Sequence[str] = ENCODE_COMMAND,
        *,
        busy: Callable[[], bool] = never_busy,
    ) -> None:
        self._command = command
        self._busy = busy

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
            InsufficientCapacityError: The disk is full, or there is no memory.
            LinkerError: What the worker says, or why it died; see `run_worker`.
        """
        request = {
            "task": "encode",
            "donor": str(donor),
            "variant": str(variant),
            "plan": plan.to_json(),
            "target": str(target),
        }
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

    async def _run(
        self, request: Mapping[str, Any], on_progress: OnStageProgress
    ) -> Mapping[str, Any]:
        return await run_worker(
            self._command, request=request, busy=self._busy, on_progress=on_progress
        )
