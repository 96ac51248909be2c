"""What to try while the demo serves, as lines to copy. Knows no server."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.cli.demo.tour import request_body


def hints(*, family: Path, state: Path, log: Path, url: str, port: int) -> Sequence[str]:
    """Returns the lines that follow the table.

    Args:
        family: Where the models lie.
        state: The server's state.
        log: Where it logs.
        url: Where it listens.
        port: The same, for `serve`.
    """
    program = program_as_started()
    again = ("--models-root", str(family), "--state", str(state), "--port", str(port))
    return (
        f"{url}/ui is the server's page; in a terminal, `{program} top --url {url}` shows the "
        "same.",
        "It serves until Ctrl-C; these ask what the table asked, and list the models:",
        "",
        *(f"  {line}" for line in curl_lines(url)),
        "",
        # See `command._check_open`.
        "The server has no API keys: whoever is on this machine may do everything.",
        f"Its log is {log}, its models lie in {family}.",
        "To serve them without the demo:",
        "",
        f"  {program} serve {shlex.join(again)}",
    )


def curl_lines(url: str) -> Sequence[str]:
    """Returns commands that give the tour's answers, one of them as a stream."""
    stream = {**request_body("instruct"), "stream": True}
    return (
        _curl(f"{url}/v1/chat/completions", request_body("chat")),
        _curl(f"{url}/v1/chat/completions", stream, "-N "),
        f"curl {url}/models",
    )


def program_as_started() -> str:
    """Returns what starts this program from where it was started, as a shell takes it."""
    started = Path(sys.argv[0])
    if started.name != "linker":  # as a module
        return shlex.join([sys.executable, "-m", "server.cli.main"])
    found = shutil.which("linker")
    is_on_path = found is not None and started.exists() and started.samefile(found)
    return "linker" if is_on_path else shlex.quote(sys.argv[0])


def _curl(url: str, body: Mapping[str, Any], options: str = "") -> str:
    kind = "-H 'Content-Type: application/json'"
    return f"curl {options}{url} {kind} -d {shlex.quote(json.dumps(body))}"
