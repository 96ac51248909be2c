from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from linker_core.lifeline import stop_signals_blocked

CHILD = """
import time
from linker_core.lifeline import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(600)
"""


def test_process_ends_with_the_one_that_started_it() -> None:
    """The end of the pipe says so: the child alone still holds it."""
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=writing) as parent:
        os.close(writing)
        with os.fdopen(reading) as lines:
            assert lines.readline() == "ready\n"
            parent.kill()
            assert lines.read() == ""  # waits for the child's end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_does_not_end_a_process_that_was_started_so(number: signal.Signals) -> None:
    with stop_signals_blocked():
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        child.send_signal(number)
        assert child.communicate(b"here")[0] == b"here"
    assert child.returncode == 0
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_process_that_was_started_so_stays_so_when_it_starts_others() -> None:
    with stop_signals_blocked():
        with stop_signals_blocked():
            pass
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as its own starter left it
    try:
        with stop_signals_blocked():
            pass
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    assert signal.SIGTERM in blocked
    assert signal.SIGINT not in blocked
