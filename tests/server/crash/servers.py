"""Servers as processes of their own, over one state directory, one after the other."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from tests.server.crash.faults import CONTROL, WATCHED, Control
from tests.server.crash.stand_in import ADDRESS, ask, read_number

DEADLINE_S = 60.0
_LISTENING = re.compile(r"listening on (http://\S+)")
_TINY = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # many processes on few cores


class Nursery:
    """The process that servers and their workers are forked from; see `nursery`."""

    def __init__(self, address: Path, process: subprocess.Popen[str]) -> None:
        self.address = address
        self._process = process

    def children(self) -> dict[int, str]:
        """Returns the processes that live now, and what each is to its server."""
        found = {}
        for child in psutil.Process(self._process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found[child.pid] = child.name()
        return found


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    """Starts the process; its children end with it."""
    address = folder / "nursery"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.crash.nursery", str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(zip(_TINY, ("1", "PASSIVE"), strict=True)),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield Nursery(address, process)
    finally:
        process.stdin.close()
        process.wait(DEADLINE_S)
        process.stdout.close()


class ServerProcess:
    """A running server over a state directory; `control` arms faults in it."""

    def __init__(self, line: socket.socket, log: Path, control: Control) -> None:
        self._line = line
        self._log = log
        self.control = control
        self.pid = read_number(line)
        self._status: int | None = None
        self.url = self._listening()
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)

    @classmethod
    def start(
        cls,
        nursery: Nursery,
        state: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Starts a server; its log and control file lie beside its state directory."""
        log, control = state.with_suffix(".log"), state.with_suffix(".faults")
        environment = {
            **os.environ, ADDRESS: str(nursery.address), CONTROL: str(control),
            WATCHED: str(state.resolve()), **(environment or {}),
        }  # fmt: skip
        arguments = ["--state", str(state), "--port", "0", *options]
        with log.open("w") as output, Path(os.devnull).open() as nothing:
            line = ask(
                str(nursery.address),
                "tests.server.crash.serve",
                arguments,
                environment,
                {0: nothing.fileno(), 1: output.fileno(), 2: output.fileno()},
            )
        return cls(line, log, Control(control))

    def kill(self) -> None:
        """Ends the server as a power cut would, and waits for the end."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def stop(self) -> None:
        """Ends the server as its operator would."""
        os.kill(self.pid, signal.SIGTERM)
        assert self.wait() == 0, self.log()

    def wait(self) -> int:
        """Waits for the end; returns the exit status."""
        if self._status is None:
            self._line.settimeout(DEADLINE_S)
            self._status = read_number(self._line)
            self._line.close()
            self.client.close()
        return self._status

    def log(self) -> str:
        """Returns what the server has written."""
        return self._log.read_text()

    def get(self, path: str) -> Any:
        """Returns a document of the server's."""
        return self.client.get(path).raise_for_status().json()

    def onboard(
        self, name: str, source: Path | str, *, wait: bool = True, **more: Any
    ) -> httpx.Response:
        """Onboards a model."""
        body = {"name": name, "source": str(source), **more}
        return self.client.post("/models", params={"wait": wait}, json=body)

    def answer(self, model: str, **more: Any) -> str:
        """Returns a greedy answer."""
        body = {"model": model, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12,
                "ignore_eos": True, **more}  # fmt: skip
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def device_bytes(self) -> dict[str, float]:
        """Returns the device's memory by use; nothing while there is no engine."""
        lines = self.client.get("/metrics").text.splitlines()
        samples = (line for line in lines if line.startswith("linker_device_memory_bytes{"))
        return {line.split('"')[3]: float(line.rsplit(" ", 1)[1]) for line in samples}

    def until(self, condition: Callable[[], bool], *, what: str) -> None:
        """Polls until the condition holds; fails with the log after the deadline."""
        give_up_at = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < give_up_at, f"{what} did not come true\n{self.log()[-4000:]}"
            time.sleep(0.01)

    def is_live(self, job: str) -> bool:
        """Whether a job waits or runs."""
        return self.get(f"/models/jobs/{job}")["status"] in ("queued", "running")

    def until_settled(self) -> None:
        """Waits until every job has ended and the server is ready."""
        self.until(lambda: not self._live_jobs(), what="the end of every job")
        self.until(lambda: self.client.get("/ready").status_code == 200, what="readiness")

    def _live_jobs(self) -> list[Any]:
        jobs = self.get("/models/jobs")["data"]
        return [job for job in jobs if job["status"] in ("queued", "running")]

    def _listening(self) -> str:
        give_up_at = time.monotonic() + DEADLINE_S
        while not (match := _LISTENING.search(self.log())):
            assert time.monotonic() < give_up_at, self.log()
            time.sleep(0.005)
        return match.group(1)
