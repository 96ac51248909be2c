"""`linker demo`: builds a small family, serves it, asks it, and prints what sharing saves."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from linker_core.errors import InvalidRequestError, LinkerError
from linker_core.sharing import plan, price
from server.cli.demo.family import default_cache, ensure_family
from server.cli.demo.hints import hints, program_as_started
from server.cli.demo.recipes import MODELS
from server.cli.demo.table import Row, answers, render, verdict
from server.cli.demo.tour import MAX_ANSWER_TOKENS, Tour
from server.registry import tables
from server.registry.database import registry_exists
from server.registry.lock import make_state
from server.registry.store import Registry
from server.settings import Settings, StorageSettings

HOST: Final = "127.0.0.1"
_REQUEST_TIMEOUT_S: Final = 120
_STOP_TIMEOUT_S: Final = 40  # the server lets running streams finish for up to 30 s
_PLAIN_WIDTH: Final = 140  # of the table where there is no terminal to fit
_NUM_NEWS: Final = 10  # lines of the training's progress where there is no terminal
_EXIT_FAILED: Final = 1
_LOG: Final = "server.log"  # in the state directory
_STOPPING: Final = "stopping; running answers get up to 30 s, Ctrl-C again ends them at once"
_EXIT_INTERRUPTED: Final = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--port", type=int, default=8000, help="where to serve (default 8000)")
    parser.add_argument(
        "--cache", type=Path, help=f"where the models are built and kept ({default_cache()})"
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="also write the table's rows"
    )


def run(args: argparse.Namespace) -> int:
    """Gives the tour, then serves until Ctrl-C; with ONCE=1 in the environment it ends there."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    signal.signal(signal.SIGTERM, _interrupt)  # stop on it as on Ctrl-C: nothing half-made
    console = Console(stderr=True)
    try:
        _check_port(args.port)
        family = _family(args.cache or default_cache(), console)
        state = state_of(family)
        _check_open(state)
        with _serving(family, state, args.port) as process:
            rows = _tour(process, family, args.port, console)
            _report(rows, args.json)
            if os.environ.get("ONCE") == "1":
                return 0 if len(rows) == len(MODELS) else _EXIT_FAILED
            return _keep_serving(process, family, state, args.port)
    except KeyboardInterrupt:
        console.print("interrupted")
        return _EXIT_INTERRUPTED


def state_of(family: Path) -> Path:
    """Returns where the registry of a family lies.

    Another one for every form of its rows and plans: a demo is sooner done anew than migrated.
    """
    forms = "".join(map(inspect.getsource, (tables, plan, price)))
    digest = hashlib.sha256(forms.encode()).hexdigest()
    return family.with_name(f"{family.name}-state-{digest[:12]}")


def _check_open(state: Path) -> None:
    """Refuses a state that has had a key: its server lets nobody in without one, nor the tour."""
    url = Settings(storage=StorageSettings(state=state)).registry_url()
    if not registry_exists(url):
        return
    with closing(Registry.open_beside(url)) as registry:
        if registry.api_keys():
            raise InvalidRequestError(
                f"the demo's state {state} has API keys, and the demo shows none: serve it with "
                f"{program_as_started()} serve --state, or remove the directory, which the demo "
                "makes anew"
            )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InvalidRequestError(
                f"port {port} of {HOST} is taken or not to be had ({error}): "
                "stop the program that listens there, or choose another with --port"
            ) from error


def _family(cache: Path, console: Console) -> Path:
    with _progress(console) as bar:
        task = bar.add_task("building the family (once)", total=None, visible=False)
        announced: set[tuple[str, int]] = set()

        def on_progress(model: str, done: int, total: int) -> None:
            bar.update(
                task, description=f"training {model}", completed=done, total=total, visible=True
            )
            news = (model, done * _NUM_NEWS // total)
            if not console.is_terminal and news not in announced:
                announced.add(news)
                console.print(f"training {model}: step {done} of {total}")

        return ensure_family(cache, on_progress)


@contextmanager
def _serving(family: Path, state: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the server in a session of its own: Ctrl-C reaches us, and we end it in good order."""
    make_state(state)
    command = [
        *(sys.executable, "-m", "server.cli.main", "serve"),
        *("--models-root", str(family), "--state", str(state), "--port", str(port)),
    ]
    log = state / _LOG
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    except KeyboardInterrupt:
        print(_STOPPING, flush=True)
        raise
    except LinkerError as error:
        last_line = log.read_text("utf-8", "replace").rstrip().rpartition("\n")[2]
        raise LinkerError(f"{error.message}: {last_line} (its log is {log})") from error
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Lets running answers finish; a second Ctrl-C ends them."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _tour(
    process: subprocess.Popen[bytes], family: Path, port: int, console: Console
) -> Sequence[Row]:
    """Returns a row for every model that could be onboarded; says why where one could not."""
    rows = []
    with (
        httpx.Client(base_url=f"http://{HOST}:{port}", timeout=_REQUEST_TIMEOUT_S) as client,
        _progress(console) as bar,
    ):
        tour = Tour(client, lambda: process.poll() is None)
        task = bar.add_task("starting the server", total=None)
        tour.wait_until_up()

        def on_stage(model: str, stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{model}: {stage}", completed=done, total=total or None)

        for name in MODELS:
            if not console.is_terminal:
                console.print(f"onboarding {name}")
            try:
                is_as_asked = tour.onboard(name, family / name, on_stage)
                if not is_as_asked:
                    console.print(f"{name} is shown as it is: its options have been changed.")
                bar.update(task, description=f"asking {name}", completed=0, total=None)
                answer = tour.ask(name)
                rows.append(Row.from_answers(name, tour.describe(name), answer))
            except LinkerError as error:
                if process.poll() is not None:
                    raise
                console.print(f"{name}: {error.message}", style="red", markup=False)
    return rows


def _report(rows: Sequence[Row], path: Path | None) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    console.print(render(rows))
    console.print(verdict(rows))
    console.print(f"\nasked, greedily and for at most {MAX_ANSWER_TOKENS} tokens:")
    console.print(answers(rows))
    console.print(
        "\nThe models are tiny and learnt for a minute from Python's own documentation: expect its "
        "words, not its sense. Of a fine-tune the server holds what the table says: mostly its "
        "difference from base, compressed as far as its answers stay its own. KL is how far they "
        "moved, in nats per token, measured before anyone is served: within 0.01 by default."
    )
    if path is not None:
        path.write_text(json.dumps([row.to_record() for row in rows], indent=1) + "\n")


def _keep_serving(process: subprocess.Popen[bytes], family: Path, state: Path, port: int) -> int:
    url = f"http://{HOST}:{port}"
    lines = hints(family=family, state=state, log=state / _LOG, url=url, port=port)
    print("", *lines, sep="\n", flush=True)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        print(_STOPPING, flush=True)
        return 0
    raise LinkerError(f"the server ended by itself with status {status}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
