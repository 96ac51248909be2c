"""A disposable process that tunes one pair: `python -m linker_core.tuning.worker`.

Reads a `TuneRequest` as one JSON line on stdin, after it `busy` and `idle` lines; prints JSON lines
on stdout: progress, then one result or one error. Killing it at any moment harms nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from linker_core.lifeline import die_with_parent
from linker_core.pace import Pace
from linker_core.residency.disposable import run_task
from linker_core.speech import progress_of
from linker_core.tuning.request import TuneRequest
from linker_core.tuning.tuner import Tuner
from linker_core.weights.checkpoint import Checkpoint


def main() -> int:
    """Tunes one pair; see `run_task`."""
    return run_task(
        lambda task, pace: answer(TuneRequest.from_json(task), pace),
        without_memory="There is not enough memory to measure what sharing costs. Unload a model, "
        "or use policy exact or thresholds.",
    )


def answer(request: TuneRequest, pace: Pace) -> dict[str, Any]:
    """Returns the tuner's result and which files it was made of, as JSON values.

    Raises:
        LinkerError: See `tune`.
    """
    with (
        Checkpoint.open(Path(request.donor)) as donor,
        Checkpoint.open(Path(request.variant)) as variant,
    ):
        tuner = Tuner(request, donor, variant, progress=progress_of("tuning"), pace=pace)
        result = tuner.run()
        return {
            "tune": result.to_json(),
            "identity": variant.identity,
            "donor_identity": donor.identity,
        }


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main())
