"""Worker processes that may die: whoever gives them a task hears of it."""

from __future__ import annotations

import contextlib
import json
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DEADLINE_S = 180.0  # of one task; an honest one takes milliseconds, a new worker some seconds
_MODULE = "tests.linker_core.weights.corruption.worker"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Child:
    """One worker process; a new one takes its place when it dies."""

    def __init__(self, scratch: Path, environment: Mapping[str, str]) -> None:
        self._scratch = scratch
        self._environment = {**environment, **_ENVIRONMENT}
        self._process = self._start()

    def ask(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer to a task, or that the worker died or hung over it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], DEADLINE_S)
        line = self._process.stdout.readline() if ready else b""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        if not ready:
            self._process.kill()
        fault = f"died with {self._process.wait()}" if ready else f"hung for {DEADLINE_S:.0f} s"
        self.close()
        self._process = self._start()
        return {"how": "?", "error": None, "fault": fault}

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(self._scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            bufsize=0,
        )


def ask_all(tasks: Sequence[Mapping[str, Any]], children: Sequence[Child]) -> list[dict[str, Any]]:
    """Returns the answers to tasks, in their order, of workers side by side."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(tasks)):
        waiting.put(number)
    answers: dict[int, dict[str, Any]] = {}

    def work(child: Child) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                task = waiting.get_nowait()
                answers[task] = child.ask(tasks[task])

    threads = [threading.Thread(target=work, args=(child,)) for child in children]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[number] for number in range(len(tasks))]
