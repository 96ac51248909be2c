"""When a worker process ends: with the process that started it, and not by a signal to all."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def die_with_parent() -> None:
    """Has this process killed when the thread that started it ends. Linux alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Keeps SIGINT and SIGTERM from the processes that this thread starts meanwhile, for good.

    A terminal and a service manager signal all processes, but only the server shall stop: it lets
    its children finish and ends them itself. A child inherits the mask before its first
    instruction; here a signal is only late by the time a start takes.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        # Not a stored mask: starts may interleave, and the last would restore the first's.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
