"""How a command ends that is interrupted, at whatever it was."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from server.cli import main as cli
from server.cli.main import EXIT_INTERRUPTED, main

PROGRAM = """
import os, signal, sys, types

def interrupted(*given):
    os.kill(os.getpid(), signal.SIGINT)

def replaced(*given):
    try:
        interrupted()
    except KeyboardInterrupt as error:
        raise ImportError("an extension could not be loaded") from error

def nothing(*given):
    return 0

signal.signal(signal.SIGINT, signal.default_int_handler)
command = types.ModuleType("command")
command.add_arguments, command.run = {add_arguments}, {run}
sys.modules["server.cli.scan"] = command
from server.cli.main import main
sys.exit(main(["scan"]))
"""


@pytest.mark.parametrize(
    ("add_arguments", "run"),
    [("interrupted", "nothing"), ("replaced", "nothing"), ("nothing", "interrupted"),
     ("nothing", "replaced")],
)  # fmt: skip
def test_interrupted_command_says_nothing_and_ends_with_130(add_arguments: str, run: str) -> None:
    program = PROGRAM.format(add_arguments=add_arguments, run=run)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (EXIT_INTERRUPTED, "", "")


def test_command_runs_with_the_handler_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Command:
        @staticmethod
        def add_arguments(_parser: object) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

        @staticmethod
        def run(_args: object) -> int:
            seen.append(signal.getsignal(signal.SIGINT))
            return 0

    monkeypatch.setitem(sys.modules, "server.cli.scan", Command)
    assert main(["scan"]) == 0
    assert seen == [cli._leave, signal.default_int_handler]


def test_fault_of_ours_is_not_taken_for_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    class Command:
        @staticmethod
        def add_arguments(_parser: object) -> None:
            """Takes none."""

        @staticmethod
        def run(_args: object) -> int:
            raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "server.cli.scan", Command)
    with pytest.raises(ZeroDivisionError):
        main(["scan"])
