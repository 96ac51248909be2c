"""The processes that `linker bench gateway` compares, each kept to one core."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from linker_core.errors import LinkerError
from server.cli.bench import process_tree

MODEL: Final = "base"
MAX_SEQUENCES: Final = 256
_RUNNERS: Final = "server.cli.bench.runners"
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_READY_S: Final = 120
_POLL_S: Final = 0.05
_COMPLAINT_CHARACTERS: Final = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Where the server runs, and where everything else does."""

    server: int
    others: int

    @classmethod
    def of_this_machine(cls) -> Cores:
        """Returns the first and the last core that this process may use, which may be the same."""
        available = sorted(os.sched_getaffinity(0))
        return cls(server=available[0], others=available[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that answers."""

    name: str
    port: int
    pid: int
    core: int

    def cpu_s(self) -> float:
        """Returns what its processes on its core have computed so far."""
        total = 0
        for pid in process_tree.members(self.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if os.sched_getaffinity(pid) == {self.core}:
                    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()
                    total += int(fields[11]) + int(fields[12])
        return total / _TICKS_PER_S

    def anonymous_bytes(self) -> int:
        """Returns the memory that the server's own process has written to."""
        for line in Path(f"/proc/{self.pid}/status").read_text("ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise LinkerError(f"{self.name} has ended.")


@contextlib.contextmanager
def gateway(model: Path, cores: Cores, *, root: Path | None = None) -> Iterator[Target]:
    """Runs the server with the stand-in engine.

    Args:
        model: A checkpoint, for its tokenizer and template.
        cores: Where.
        root: Of another version's source, to compare with; None for this one.
    """
    with tempfile.TemporaryDirectory() as state, _free_port() as port:
        config = Path(state, "settings.yaml")
        # Written as YAML, whose flow style is JSON.
        limits = {"http": {"max_inflight": MAX_SEQUENCES}}
        config.write_text(json.dumps(limits))
        command = (
            *_python(f"{_RUNNERS}.gateway_server", safe=root is None),
            *(str(cores.server), str(cores.others)),
            *("--config", str(config), "--state", state, "--port", str(port)),
            *("--policy", "exact", "--strict", "--model", f"{MODEL}={model}"),
        )
        name = "gateway" if root is None else "gateway before"
        with _running(name, command, port, "/ready", cores, root=root) as target:
            yield target


@contextlib.contextmanager
def floor(kind: str, answers: dict[str, Any], cores: Cores) -> Iterator[Target]:
    """Runs what answers the same bytes without a gateway; see the runner for the kinds."""
    with tempfile.TemporaryDirectory() as folder, _free_port() as port:
        given = Path(folder, "answers.json")
        given.write_text(json.dumps(answers))
        command = (
            *_python(f"{_RUNNERS}.gateway_floor", safe=True),
            *(str(cores.server), str(port), str(given), kind),
        )
        with _running(kind, command, port, "/", cores) as target:
            yield target


def _python(module: str, *, safe: bool) -> Sequence[str]:
    return (sys.executable, *(("-P",) if safe else ()), "-m", module)


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    yield port


@contextlib.contextmanager
def _running(
    name: str,
    command: Sequence[str],
    port: int,
    path: str,
    cores: Cores,
    *,
    root: Path | None = None,
) -> Iterator[Target]:
    environment = os.environ if root is None else os.environ | {"PYTHONPATH": str(root)}
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=root,
            )
        stack.enter_context(process_tree.ended(process))
        give_up_at = time.monotonic() + _READY_S
        while process.poll() is None and time.monotonic() < give_up_at:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).is_success:
                    yield Target(name=name, port=port, pid=process.pid, core=cores.server)
                    return
            time.sleep(_POLL_S)
        complaint = log.read_text(errors="replace")[-_COMPLAINT_CHARACTERS:].strip()
        raise LinkerError(f"The {name} of the benchmark is not ready. {complaint}")
