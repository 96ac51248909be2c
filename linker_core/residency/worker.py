"""A disposable process that makes and checks deltas: `python -m linker_core.residency.worker`.

Reads a task as one JSON line on stdin, after it `busy` and `idle` lines; prints JSON lines on
stdout: progress, then one result or one error. Killing it at any moment harms nothing but a folder
whose name says that it is incomplete.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linker_core.lifeline import die_with_parent
from linker_core.pace import Pace
from linker_core.residency.adapter import write_adapter
from linker_core.residency.delta_writer import write_delta
from linker_core.residency.disposable import run_task
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_data import check_data, check_donor
from linker_core.sharing.plan import SharePlan
from linker_core.speech import progress_of
from linker_core.weights.checkpoint import Checkpoint


def main() -> int:
    """Does one task; see `run_task`."""
    return run_task(
        perform,
        without_memory="There is not enough memory to make the delta. Unload a model, or give the "
        "server more.",
    )


def perform(task: Mapping[str, Any], pace: Pace) -> dict[str, Any]:
    """Writes a delta of a variant (`encode`) or of an adapter (`adapter`), or reads one (`verify`).

    Returns:
        The delta's plan, and what its file is, as JSON values.

    Raises:
        LinkerError: See `write_delta`, `write_adapter`, `check_data` and `check_donor`.
    """
    with Checkpoint.open(Path(task["donor"])) as donor:
        if task["task"] == "verify":
            with DeltaFile.open(Path(task["delta"])) as delta:
                check_donor(delta, donor)
                check_data(delta, progress=progress_of("verifying"), pace=pace)
                return _described(delta)
        target, progress = Path(task["target"]), progress_of("encoding")
        if task["task"] == "adapter":
            write_adapter(
                Path(task["adapter"]),
                donor,
                target,
                donor_fingerprint=task["donor_fingerprint"],
                progress=progress,
                pace=pace,
            )
        else:
            assert task["task"] == "encode", task["task"]
            plan = SharePlan.from_json(task["plan"])
            with Checkpoint.open(Path(task["variant"])) as variant:
                write_delta(plan, donor, variant, target, progress=progress, pace=pace)
    with DeltaFile.open(target) as delta:
        return _described(delta)


def _described(delta: DeltaFile) -> dict[str, Any]:
    return {
        "plan": delta.plan.to_json(),
        "identity": delta.identity,
        "fingerprint": delta.fingerprint,
        "nbytes": delta.nbytes,
    }


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main())
