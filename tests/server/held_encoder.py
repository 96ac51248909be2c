"""The encoding worker, except that tests see what it was asked and can hold it up.

Tasks are logged, and a file beside the log holds them up, in the directory of the donor.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from linker_core.errors import LinkerError
from linker_core.lifeline import die_with_parent
from linker_core.pace import Pace
from linker_core.residency.worker import perform
from linker_core.speech import say

HELD_ENCODER = (sys.executable, "-m", "tests.server.held_encoder")
LOG, BLOCKER = "encodings.log", "encoder-waits"


def tasks(donor: Path) -> list[str]:
    """Returns what encoders were asked that used a donor, in order."""
    log = donor / LOG
    return log.read_text().split() if log.exists() else []


def main() -> int:
    task = json.loads(sys.stdin.readline())
    donor = Path(task["donor"])
    with (donor / LOG).open("a") as log:
        log.write(task["task"] + "\n")
    say({"stage": "encoding", "done_bytes": 1, "total_bytes": 2})
    while (donor / BLOCKER).exists():
        time.sleep(0.01)
    try:
        say({"result": perform(task, Pace())})
    except LinkerError as error:
        say({"error": error.to_record()})
        return 1
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main())
