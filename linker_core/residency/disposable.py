"""How a disposable worker that allocates tensors runs its one task and says how that ended."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from linker_core.errors import InsufficientCapacityError, LinkerError
from linker_core.pace import Pace
from linker_core.residency.device import is_lack_of_memory
from linker_core.speech import say


def run_task(perform: Callable[[Any, Pace], dict[str, Any]], *, without_memory: str) -> int:
    """Reads a task as one JSON line from stdin, follows the pace lines after it, and says the end.

    Args:
        perform: Takes the task and returns its result, both JSON values.
        without_memory: What is said where memory does not suffice, with the remedy.

    Returns:
        The process's exit status: 1 after an error line, or when nobody listens any more.
    """
    try:
        return _run(perform, without_memory)
    except BrokenPipeError:
        # What could not be said is still to be flushed when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(perform: Callable[[Any, Pace], dict[str, Any]], without_memory: str) -> int:
    task = json.loads(sys.stdin.readline())
    pace = Pace()
    pace.follow(sys.stdin)
    try:
        result = perform(task, pace)
    except LinkerError as error:
        say({"error": error.to_record()})
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        reason = f"{str(error).partition(chr(10))[0]:.300}"
        say({"error": InsufficientCapacityError(f"{without_memory} ({reason})").to_record()})
        return 1
    say({"result": result})
    return 0
