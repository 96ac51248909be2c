"""A child process that spoils folders and opens them: one JSON line in, one out.

Whatever a spoilt folder does to it, the parent sees: a crash, a hang, a fault of another kind.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from linker_core.errors import LinkerError
from tests.linker_core.weights.corruption import oracles
from tests.linker_core.weights.corruption.mutations import ADAPTER, CHECKPOINT, DELTA, mutate

_MORE_BYTES = 1 << 30  # address space that one folder may take
_KINDS = {"checkpoint": CHECKPOINT, "delta": DELTA, "adapter": ADAPTER}


def examine(task: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Spoils a copy of a folder as the seed says; returns how, and what came of it."""
    folder = scratch / "mutant"
    shutil.copytree(task["original"], folder)
    rng = random.Random(f"{task['kind']} {task['seed']}")
    how, differs = mutate(folder, rng, _KINDS[task["kind"]])
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    answer: dict[str, Any] = {"how": how, "error": None, "fault": None}
    try:
        _check(task, folder, differs=differs)
    except LinkerError as error:
        answer["error"] = error.to_record()
        try:
            oracles.check_refusal(error, folder)
        except oracles.OracleError as fault:
            answer["fault"] = str(fault)
    except BaseException:  # noqa: BLE001 - the parent is told of all of them
        answer["fault"] = traceback.format_exc()
    if len(os.listdir("/proc/self/fd")) != descriptors:  # noqa: PTH208
        answer["fault"] = answer["fault"] or "a file was left open"
    return answer


def _check(task: dict[str, Any], folder: Path, *, differs: bool) -> None:
    if task["kind"] == "checkpoint":
        oracles.check_checkpoint(folder, Path(task["original"]), differs=differs)
    elif task["kind"] == "adapter":
        oracles.check_adapter(folder, Path(task["base"]))
    else:
        oracles.check_delta(folder, Path(task["base"]))


def main() -> None:
    """Answers tasks until stdin ends; the argument is a directory of its own."""
    scratch = Path(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = True
    for line in sys.stdin:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        sys.stdout.write(json.dumps(examine(json.loads(line), scratch)) + "\n")
        sys.stdout.flush()
        if first:  # what is imported and compiled on the way is there now
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + _MORE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            first = False
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
