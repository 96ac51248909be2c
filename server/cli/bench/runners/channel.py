"""What a benchmark and an engine's process say to each other: a JSON object a line.

`python channel.py RUNNER SETTINGS` imports the module RUNNER and calls its `load(settings)`, which
returns a function that runs rounds. Standard library alone, since it runs in any environment.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Takes streams, each with `model`, an index, and `prompt_ids`, and how many tokens each shall have;
# returns for each stream when its tokens came, in seconds of `time.perf_counter`.
RunRound = Callable[[list[dict[str, Any]], int], list[list[float]]]


def main() -> None:
    """Loads the engine, says so, and answers rounds until stdin ends."""
    answers = _claim_stdout()
    run_round: RunRound = importlib.import_module(sys.argv[1]).load(json.loads(sys.argv[2]))
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        times = run_round(asked["streams"], asked["max_tokens"])
        seconds = time.perf_counter() - started
        streams = [[at - started for at in stream] for stream in times]
        _answer(answers, {"seconds": seconds, "streams": streams})


def _claim_stdout() -> int:
    """Returns a descriptor for answers alone; what libraries print goes to stderr from now on."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def _answer(descriptor: int, record: dict[str, Any]) -> None:
    data = memoryview((json.dumps(record) + "\n").encode())
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    main()
