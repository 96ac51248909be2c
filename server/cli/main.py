"""Dispatches `linker COMMAND …` to its module, so that each command imports only what it needs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from linker_core.errors import LinkerError
from server.cli.discreet import DiscreetFormatter

COMMANDS = {
    "serve": "serve many variants of one model over OpenAI's HTTP API",
    "scan": "compare a variant with its donor, block by block",
    "plan": "say what would be aliased, what it would save and what it would cost",
    "tune": "measure what plans of a pair cost and choose one",
    "export": "write a variant as its delta to the donor, to ship in the place of a copy",
    "keys": "make, list and revoke API keys, also while a server runs",
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
    module = importlib.import_module(f"server.cli.{command}")
    parser = argparse.ArgumentParser(
        prog=f"linker {command}", description=COMMANDS[command], allow_abbrev=False
    )
    module.add_arguments(parser)
    parsed = parser.parse_args(arguments[1:])
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(DiscreetFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every connection
    try:
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
    return status


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: linker COMMAND [options]", "", *lines, "", "linker COMMAND --help"])


if __name__ == "__main__":
    sys.exit(main())
