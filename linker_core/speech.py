"""What a disposable worker says on stdout: JSON lines of progress, then one result or one error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_PROGRESS_INTERVAL_S = 0.1


def say(record: Mapping[str, Any]) -> None:
    """Writes one line at once."""
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def progress_of(stage: str) -> Callable[[int, int], None]:
    """Returns a callback of bytes done and bytes in all.

    It writes at most ten lines a second, and always the last one.
    """
    said_at = 0.0

    def report(done: int, total: int) -> None:
        nonlocal said_at
        now = time.monotonic()
        if done == total or now - said_at >= _PROGRESS_INTERVAL_S:
            said_at = now
            say({"stage": stage, "done_bytes": done, "total_bytes": total})

    return report
