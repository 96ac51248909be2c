"""Dispatches `linker COMMAND …` to its module, so that each command imports only what it needs."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from types import FrameType
from typing import Any

from linker_core.errors import LinkerError
from server.cli.discreet import DiscreetFormatter

COMMANDS = {
    "serve": "serve many variants of one model over OpenAI's HTTP API",
    "scan": "compare a variant with its donor, block by block",
    "plan": "say what would be aliased, what it would save and what it would cost",
    "tune": "measure what plans of a pair cost and choose one",
    "analyze": "study what fine-tuning did to a family's weights",
    "export": "write a variant as its delta to the donor, to ship in the place of a copy",
    "keys": "make, list and revoke API keys, also while a server runs",
    "top": "watch a running server: what it shares, saves and does",
    "eval": "run benchmarks on a served model, and say what sharing retains of them",
    "bench": "measure scan, admission, tuner, engine and server on this machine",
    "demo": "build a small family, serve it, ask it and print what sharing saves",
}
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
EXIT_BROKEN_PIPE = 141  # and of one that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a user's error is one line on stderr and exit status 2."""
    # Spinning OpenMP threads slow everything tenfold as soon as two processes share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command in ("-V", "--version"):
        print(f"linker {version('linker-llm')}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else " See linker --help."
        print(f"linker: {command!r} is no command.{hint}", file=sys.stderr)
        return EXIT_USAGE
    try:
        with _leaving_at_once():
            module, parsed = _prepared(command, arguments[1:])
        status = int(module.run(parsed))
        sys.stdout.flush()
    except LinkerError as error:
        print(f"linker {command}: {error.message}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python would complain again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if _comes_of_interrupt(error):
            return EXIT_INTERRUPTED
        raise
    return status


def _prepared(command: str, arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Returns a command's module and what it was given, and sets the log up."""
    module = importlib.import_module(f"server.cli.{command}")
    parser = argparse.ArgumentParser(
        prog=f"linker {command}", description=COMMANDS[command], allow_abbrev=False
    )
    module.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(DiscreetFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every connection
    return module, parsed


@contextlib.contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Ends the process on Ctrl-C, without an exception, while there is nothing to tidy up.

    Extension modules print one that reaches them while they are imported, or replace it.
    """
    usual = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or usual is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def _comes_of_interrupt(error: BaseException | None) -> bool:
    """Whether a library has made another exception of Ctrl-C's, as some do of a late import."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: linker COMMAND [options]", "", *lines, "", "linker COMMAND --help"])


if __name__ == "__main__":
    sys.exit(main())
