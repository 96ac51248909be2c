"""The scan worker as a disposable process: fingerprints and reports over JSON lines.

It reads files that nobody here trusts; whatever they do to it, only that process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linker_core.errors import BadCheckpointError, from_record
from linker_core.weights.checkpoint import Identity
from server.bridge.process import stop_signals_blocked

logger = logging.getLogger(__name__)

SCAN_COMMAND = (sys.executable, "-m", "linker_core.sharing.worker")
_MAX_LINE_BYTES = 256 * 1024**2  # a report holds every tensor of a model

OnScanProgress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    """What the worker found out, and of which files."""

    fingerprint: str | None  # None: it was not asked for
    report: Mapping[str, Any] | None = None
    identity: Identity | None = None
    donor_identity: Identity | None = None


class Scanner:
    """Starts scan workers and reads what they say.

    Args:
        command: The worker's command line without its options.
    """

    def __init__(self, command: Sequence[str] = SCAN_COMMAND) -> None:
        self._command = command

    async def run(
        self,
        variant: Path,
        *,
        donor: Path | None = None,
        hashed: bool = True,
        scanned: bool = True,
        on_progress: OnScanProgress,
    ) -> ScanResult:
        """Fingerprints a checkpoint if `hashed`; if `scanned`, compares two or checks the one.

        Cancelling the wait kills the worker.

        Raises:
            LinkerError: What the worker says of the checkpoint, or `BadCheckpointError` if it died.
        """
        donor_options = () if donor is None else ("--donor", str(donor))
        with stop_signals_blocked():
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *("--variant", str(variant)),
                *donor_options,
                *(() if hashed else ("--no-hash",)),
                *(() if scanned else ("--no-scan",)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                limit=_MAX_LINE_BYTES,
            )
        assert process.stdout is not None
        try:
            outcome = await _read_outcome(process.stdout, on_progress)
            status = await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if outcome is None:
            logger.warning("the scan worker ended with status %d and no result", status)
            raise BadCheckpointError(
                "The checkpoint could not be read to its end: a file changed or was cut short "
                "while it was being read. Copy the model again and retry."
            )
        return outcome


async def _read_outcome(
    stdout: asyncio.StreamReader, on_progress: OnScanProgress
) -> ScanResult | None:
    """Follows the worker's lines up to its result; None if it ends without one."""
    while line := await stdout.readline():
        try:
            message = json.loads(line)
        except ValueError:
            return None  # cut off in the middle of a line
        if "error" in message:
            raise from_record(message["error"])
        if "result" in message:
            result = message["result"]
            return ScanResult(
                fingerprint=result["fingerprint"],
                report=result.get("report"),
                identity=_identity(result.get("identity")),
                donor_identity=_identity(result.get("donor_identity")),
            )
        on_progress(message["stage"], message["done_bytes"], message["total_bytes"])
    return None


def _identity(record: list[list[Any]] | None) -> Identity | None:
    return None if record is None else tuple((n, d, i, s, m, c) for n, d, i, s, m, c in record)
