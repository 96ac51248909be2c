"""A disposable process that tunes one pair: `python -m linker_core.tuning.worker`.

Reads a `TuneRequest` as one JSON line on stdin, after it `busy` and `idle` lines; prints JSON lines
on stdout: progress, then one result or one error. Killing it at any moment harms nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linker_core.errors import InsufficientCapacityError, LinkerError
from linker_core.lifeline import die_with_parent
from linker_core.pace import Pace
from linker_core.tuning.request import TuneRequest
from linker_core.tuning.tuner import Tuner
from linker_core.weights.checkpoint import Checkpoint

_PROGRESS_INTERVAL_S = 0.1


def main() -> int:
    """Tunes one pair; exit status 1 after an error line."""
    request = TuneRequest.from_json(json.loads(sys.stdin.readline()))
    pace = Pace()
    pace.follow(sys.stdin)
    try:
        result = answer(request, pace)
    except LinkerError as error:
        _emit({"error": error.to_record()})
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        short = InsufficientCapacityError(
            "There is not enough memory to measure what sharing costs. Unload a model, or use "
            f"policy exact or thresholds. ({str(error).partition(chr(10))[0]:.300})"
        )
        _emit({"error": short.to_record()})
        return 1
    _emit({"result": result})
    return 0


def _is_lack_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an allocation failed, in Python, on a CUDA device, or in torch on the CPU."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)  # torch has no class for this one
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
        tuner = Tuner(request, donor, variant, progress=_reporter(), pace=pace)
        result = tuner.run()
        return {
            "tune": result.to_json(),
            "identity": variant.identity,
            "donor_identity": donor.identity,
        }


def _reporter() -> Callable[[int, int], None]:
    """Returns a progress callback that prints at most ten lines a second and the last one."""
    printed_at = 0.0

    def report(done: int, total: int) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if done == total or now - printed_at >= _PROGRESS_INTERVAL_S:
            printed_at = now
            _emit({"stage": "tuning", "done_bytes": done, "total_bytes": total})

    return report


def _emit(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main())
