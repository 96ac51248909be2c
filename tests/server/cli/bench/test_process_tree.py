from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from server.cli.bench import process_tree

# A process with a child; both hold 32 MB and say so on one line each, written whole.
_HOLD = "held = bytearray(b'x') * (32 << 20); os.write(1, b'ready\\n'); sys.stdin.read()"
_TREE = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", {"import os, sys; " + _HOLD!r}])
{_HOLD}
"""


@pytest.fixture
def tree() -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with (
        subprocess.Popen([sys.executable, "-c", _TREE], stdin=pipe, stdout=pipe) as process,
        process_tree.ended(process),
    ):
        assert process.stdout is not None
        assert [process.stdout.readline(), process.stdout.readline()] == [b"ready\n"] * 2
        yield process


def _states(pids: list[int]) -> set[str | None]:
    return set(map(process_tree.state_of, pids))


def test_memory_counts_the_whole_tree(tree: subprocess.Popen[bytes]) -> None:
    found = process_tree.memory_of(tree.pid)
    assert 64 << 20 <= found.anonymous_bytes < 128 << 20
    assert found.anonymous_bytes < found.pss_bytes


def test_a_tree_is_halted_and_goes_on(tree: subprocess.Popen[bytes]) -> None:
    pids = process_tree.members(tree.pid)
    assert len(pids) == 2
    process_tree.pause(tree.pid)
    assert _states(pids) == {"T"}
    process_tree.resume(tree.pid)
    assert "T" not in _states(pids)


def test_a_halted_tree_is_ended_to_its_last_process() -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-c", _TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
        process_tree.ended(process),
    ):
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        pids = process_tree.members(process.pid)
        process_tree.pause(process.pid)
    assert _states(pids) <= {"Z", None}  # a child's body is its new parent's to clear away


def test_what_has_ended_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
        assert process_tree.memory_of(process.pid).pss_bytes == 0
