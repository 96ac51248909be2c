"""The scan worker as the server meets it: fingerprints, reports and nearness of checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linker_core.weights.checkpoint import Identity
from server.onboarding.processes import OnStageProgress, never_busy, run_worker

SCAN_COMMAND = (sys.executable, "-P", "-m", "linker_core.sharing.worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    """What the worker found out, and of which files."""

    fingerprint: str | None  # None: it was not asked for
    report: Mapping[str, Any] | None = None
    identity: Identity | None = None
    donor_identity: Identity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearness:
    """How close a model is to one donor; see `linker_core.sharing.closeness`."""

    identity: Identity | None  # of the donor's files; None: they could not be opened
    mean_cos: float | None = None
    mean_epsilon: float | None = None
    error: str | None = None  # why they could not


class Scanner:
    """Starts scan workers and reads what they say.

    Args:
        command: The worker's command line without its options.
        device: Where sums over pairs are computed, if it has room.
        busy: Whether sequences run now; the worker holds back while they do.
    """

    def __init__(
        self,
        command: Sequence[str] = SCAN_COMMAND,
        *,
        device: str = "cpu",
        busy: Callable[[], bool] = never_busy,
    ) -> None:
        self._command = command
        self._device = device
        self._busy = busy

    async def run(
        self,
        variant: Path,
        *,
        donor: Path | None = None,
        hashed: bool = True,
        scanned: bool = True,
        on_progress: OnStageProgress,
    ) -> ScanResult:
        """Fingerprints a checkpoint if `hashed`; if `scanned`, compares two or checks the one.

        Cancelling the wait kills the worker.

        Raises:
            LinkerError: What the worker says of the checkpoint, or why it died; see `run_worker`.
        """
        command = (
            *self._command,
            *("--variant", str(variant)),
            *(() if donor is None else ("--donor", str(donor))),
            *(() if hashed else ("--no-hash",)),
            *(() if scanned else ("--no-scan",)),
            *(() if self._device == "cpu" else ("--device", self._device)),
        )
        result = await run_worker(command, busy=self._busy, on_progress=on_progress)
        return ScanResult(
            fingerprint=result["fingerprint"],
            report=result.get("report"),
            identity=_identity(result.get("identity")),
            donor_identity=_identity(result.get("donor_identity")),
        )

    async def compare(
        self, variant: Path, donors: Sequence[Path], *, on_progress: OnStageProgress
    ) -> tuple[Identity, list[Nearness]]:
        """Says which files a variant was read from, and how close it is to each of some donors.

        Cancelling the wait kills the worker.

        Raises:
            LinkerError: What the worker says of the variant, or why it died; see `run_worker`.
        """
        near = (part for donor in donors for part in ("--near", str(donor)))
        command = (*self._command, "--variant", str(variant), *near)
        result = await run_worker(command, busy=self._busy, on_progress=on_progress)
        identity = _identity(result["identity"])
        assert identity is not None
        return identity, [
            Nearness(**{**found, "identity": _identity(found["identity"])})
            for found in result["near"]
        ]


def _identity(record: list[list[Any]] | None) -> Identity | None:
    return None if record is None else tuple((n, d, i, s, m, c) for n, d, i, s, m, c in record)
