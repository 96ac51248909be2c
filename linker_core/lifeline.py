"""When a worker process ends: with the process that started it, and not by a signal to all."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Starts(threading.local):
    """How many starts this thread is at, since a mask is a thread's."""

    number = 0
    before: Collection[int] = ()


_starts = _Starts()


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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    if _starts.number == 0:
        _starts.before = before
    _starts.number += 1
    try:
        yield
    finally:
        # Starts may interleave: the last to end gives back what was there before the first. That
        # may be this very mask, in a process that was started so and starts others.
        _starts.number -= 1
        if _starts.number == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, _starts.before)
