"""Memory of a whole server, seen from outside: what the process tree alone keeps in memory.

A synthetic donor of about 400 MB and near copies of it are served; each admission's steady state
and peak are read from /proc while it happens.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.tiny import make_checkpoint, make_variant

MIB = 2**20
_SAMPLE_S = 0.02
_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What one admission did to the process tree."""

    model: str
    unique_bytes: int  # as the server reports them
    logical_bytes: int
    steady_bytes: int  # after it, a request answered
    peak_bytes: int  # largest seen while it ran


def make_family(folder: Path, *, num_variants: int = 3) -> list[Path]:
    """Writes a donor of 398 MB in bfloat16 and near copies; returns the directories."""
    donor = make_checkpoint(
        folder / "base", layers=12, hidden=1024, intermediate=4096, vocab_size=16_000
    )
    copies = [
        make_variant(folder / f"copy-{n}", donor, scale=0.01, seed=n) for n in range(num_variants)
    ]
    return [donor, *copies]


def measure(models: Sequence[Path], *, state: Path) -> list[Admission]:
    """Serves the first model, onboards the others one by one, and reads memory all along."""
    with served(models[0].parent, state) as (process, client):
        return [
            _admit(process, client, path, donor=models[0].name if number else None)
            for number, path in enumerate(models)
        ]


def _admit(
    process: psutil.Process, client: httpx.Client, path: Path, *, donor: str | None
) -> Admission:
    with _PeakSampler(process) as sampler:
        body = {"name": path.name, "source": str(path), "policy": "thresholds"}
        answer = client.post(
            "/models", params={"wait": "true"}, json=body | {"donor": donor or "auto"}
        )
        answer.raise_for_status()
    chat = {"model": path.name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    client.post("/v1/chat/completions", json=chat).raise_for_status()
    reported = client.get(f"/models/{path.name}").raise_for_status().json()["bytes"]
    return Admission(
        model=path.name,
        unique_bytes=reported["unique"],
        logical_bytes=reported["logical"],
        steady_bytes=tree_memory(process),
        peak_bytes=sampler.peak_bytes,
    )


def tree_memory(process: psutil.Process) -> int:
    """Returns the anonymous and shared memory of a process and all its descendants.

    Pages of files are left out: a scan maps both checkpoints, and the system drops such clean pages
    whenever it wants them. All else is counted once, however many processes share it.
    """
    total = 0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            rollup = Path(f"/proc/{member.pid}/smaps_rollup").read_text("ascii")
            for line in rollup.splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) * 1024
    return total


class _PeakSampler(threading.Thread):
    """Reads the tree's memory again and again while the block runs."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._process = process
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, tree_memory(self._process))

    def __enter__(self) -> _PeakSampler:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._done.set()
        self.join()


@contextlib.contextmanager
def served(root: Path, state: Path, *options: str) -> Iterator[tuple[psutil.Process, httpx.Client]]:
    """Runs `linker serve` on models below `root` until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server.cli.main", "serve", "--port", str(port)]
    places = ["--models-root", str(root), "--state", str(state)]
    command += [*places, *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=_DEADLINE_S, trust_env=False) as client:
                _until_healthy(client)
                yield psutil.Process(server.pid), client
        finally:
            server.terminate()


def _until_healthy(client: httpx.Client) -> None:
    give_up_at = time.monotonic() + _DEADLINE_S
    while time.monotonic() < give_up_at:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").is_success:
                return
        time.sleep(0.1)
    raise TimeoutError("the server did not become healthy")


def report(rows: Sequence[Admission]) -> None:
    """Prints a row per admission."""
    print("model      unique MiB  steady MiB  growth MiB  peak over the state before MiB")
    before = rows[0].steady_bytes
    for row in rows:
        figures = (row.unique_bytes, row.steady_bytes, row.steady_bytes - before)
        over = row.peak_bytes - before
        print(f"{row.model:<10}", *(f"{figure / MIB:>11.1f}" for figure in (*figures, over)))
        before = row.steady_bytes
