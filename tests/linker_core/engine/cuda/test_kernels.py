"""The Triton kernels in Triton's interpreter, in a process of their own.

The interpreter has to be chosen before Triton is first imported, and others import it, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra 'kernels' is not installed")

TESTS = Path(__file__).with_name("interpreted_kernels.py")


@pytest.mark.timeout(900)  # every element of every launch is Python's
def test_kernels_in_the_interpreter_equal_their_definitions() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
