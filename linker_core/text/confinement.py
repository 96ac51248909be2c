"""Bounds a process that handles what strangers wrote: memory, files, children, and its life."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from linker_core.lifeline import die_with_parent

_MAX_OPEN_FILES = 32


def confine(*, memory_bytes: int, cpu_s: int | None = None, is_alone: bool = False) -> None:
    """Bounds this process for the rest of its life. It ends with the one that started it.

    Args:
        memory_bytes: Of addresses, most of them never touched.
        cpu_s: Of processor time in all, after which it is killed; None for no bound.
        is_alone: Whether it starts neither threads nor processes from here on. Root may all the
            same.
    """
    die_with_parent()
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,  # it may write to pipes, to no file
        resource.RLIMIT_NOFILE: _MAX_OPEN_FILES,
        **({} if cpu_s is None else {resource.RLIMIT_CPU: cpu_s}),
        # The system counts all that the user runs, here or elsewhere: none is the only number that
        # says something of this process alone. It bounds nobody else.
        **({resource.RLIMIT_NPROC: 0} if is_alone else {}),
    }
    for kind, wanted in limits.items():
        _, most = resource.getrlimit(kind)
        bound = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(kind, (bound, bound))


@contextmanager
def less_memory(memory_bytes: int) -> Iterator[None]:
    """Bounds the addresses of this process for a while, more tightly than `confine` did."""
    bound, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (bound, most))


def arm(cpu_s: float) -> None:
    """Has the system kill this process after so much processor time; 0: not any more.

    Unlike a bound of the whole life this is exact to some milliseconds, and a piece of C code that
    comes to no end does not escape it.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
