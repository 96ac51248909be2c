"""Runs work on a registry in a process that is killed at a chosen write."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator

from sqlalchemy import event
from sqlalchemy.engine import Engine

from server.registry.store import Registry

DEADLINE_S = 60.0
# Forks of a process that has imported all of this, and nothing of the tests' threads.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])

Work = Callable[[Registry], None]


def kills(url: str, work: Work | None) -> Iterator[int]:
    """Opens a registry, does work with it, and is killed before its first write, second write, ….

    Without work it is killed while the registry opens. A commit counts as a write. Yields after
    each kill, and ends with the first attempt that runs to its end.
    """
    for number in itertools.count(1):
        process = _PROCESSES.Process(target=_run, args=(url, work, number))
        process.start()
        process.join(DEADLINE_S)
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL
        yield number


def _run(url: str, work: Work | None, number: int) -> None:
    countdown = iter(range(number - 1, -1, -1))

    def step(_connection: object) -> None:
        if next(countdown) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def execute(connection: object, _cursor: object, statement: str, *_args: object) -> None:
        if not statement.lstrip().startswith(("SELECT", "PRAGMA")):
            step(connection)

    def watch() -> None:
        event.listen(Engine, "before_cursor_execute", execute)
        event.listen(Engine, "commit", step)

    if work is None:
        watch()
        Registry.open(url)
    else:
        registry = Registry.open(url)
        watch()
        work(registry)
