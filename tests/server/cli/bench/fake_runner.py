"""Runners without an engine, for `channel`: the settings say what goes wrong."""

from __future__ import annotations

import sys
import time
from typing import Any

from server.cli.bench.runners.channel import RunRound


def load(settings: dict[str, Any]) -> RunRound:
    """Answers at once; `missing` tokens of each answer do not come, `fail` ends the process."""
    sys.stdout.write("what a library prints\n")
    sys.stdout.flush()
    if settings.get("fail") == "load":
        sys.exit("no such weights")

    def run_round(streams: list[dict[str, Any]], max_tokens: int) -> list[list[float]]:
        if settings.get("fail") == "round" and max_tokens > 4:
            sys.exit("out of memory")
        now = time.perf_counter()
        return [[now] * (max_tokens - settings.get("missing", 0)) for _ in streams]

    return run_round
