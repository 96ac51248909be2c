from __future__ import annotations

import os
import subprocess
import sys

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
