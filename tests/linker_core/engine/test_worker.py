"""The engine process over its real socket and heartbeat."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import pytest

from linker_core.engine.messages import (
    Abort,
    Command,
    EngineReady,
    Event,
    FinishReason,
    LoadFailed,
    LoadProgress,
    ModelLoaded,
    ModelUnloaded,
    RequestFailed,
    Shutdown,
    Snapshot,
    StepOutput,
    Submit,
    TokenOutput,
    UnloadModel,
)
from tests.linker_core.engine.driving import GREEDY, SMALL, load_message
from tests.linker_core.engine.families import reference_greedy, reference_model
from tests.tiny import make_checkpoint, make_variant

PROMPT = (300, 17, 254, 8)
TIMEOUT_S = 60.0
E = TypeVar("E", bound=Event)


class Worker:
    """A running engine process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.heartbeat_fd = os.memfd_create("heartbeat")
        os.ftruncate(self.heartbeat_fd, 8)
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "linker_core.engine.worker",
                "--socket-fd", str(theirs.fileno()),
                "--heartbeat-fd", str(self.heartbeat_fd),
                "--config", SMALL.to_json(),
            ],
            pass_fds=(theirs.fileno(), self.heartbeat_fd),
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
            stderr=subprocess.PIPE,
        )  # fmt: skip
        theirs.close()
        self.connection: Connection[Command, Event] = Connection(ours.detach())
        self.events: list[Event] = []

    def next_event(self) -> Event:
        assert self.connection.poll(TIMEOUT_S), "the engine says nothing"
        event = self.connection.recv()
        self.events.append(event)
        return event

    def wait_for(self, kind: type[E], fits: Callable[[E], bool] = lambda _: True) -> E:
        while True:
            event = self.next_event()
            if isinstance(event, kind) and fits(event):
                return event

    def last(self, kind: type[E]) -> E:
        return [event for event in self.events if isinstance(event, kind)][-1]

    def collect(self, request_id: str) -> list[TokenOutput]:
        """Reads until the sequence has ended."""
        tokens: list[TokenOutput] = []
        while not tokens or tokens[-1].finish_reason is None:
            output = self.wait_for(StepOutput)
            tokens += [token for token in output.tokens if token.request_id == request_id]
        return tokens

    def beats(self) -> int:
        value: tuple[int] = struct.unpack("<Q", os.pread(self.heartbeat_fd, 8, 0))
        return value[0]

    def wait_for_beats(self, count: int) -> None:
        """Returns when the heartbeat has moved on by `count`."""
        target, deadline = self.beats() + count, time.monotonic() + TIMEOUT_S
        while self.beats() < target:
            assert time.monotonic() < deadline, "the heartbeat stands still"
            time.sleep(0.01)

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.communicate()
        os.close(self.heartbeat_fd)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    try:
        yield worker
    finally:
        worker.stop()


def submit(request_id: str, model: str, *, max_tokens: int = 8) -> Submit:
    params = replace(GREEDY, max_tokens=max_tokens)
    return Submit(request_id=request_id, model=model, prompt_ids=PROMPT, sampling=params)


def test_worker_loads_generates_aborts_unloads_and_leaves_on_eof(
    worker: Worker, tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False)
    variant = make_variant(tmp_path / "variant", base, scale=0.3)
    assert worker.next_event() == EngineReady(device="cpu")
    fresh = worker.next_event()  # unasked, so that what is free is known at once
    assert isinstance(fresh, Snapshot)
    assert (fresh.models, fresh.device) == ({}, "cpu")
    assert fresh.device_free_bytes > 0
    worker.wait_for_beats(3)  # idle

    worker.connection.send(load_message("base", base))
    assert worker.wait_for(ModelLoaded).max_model_len == 256
    assert "base" in worker.last(Snapshot).models
    worker.connection.send(load_message("variant", variant, donor="base"))
    worker.wait_for(ModelLoaded)

    worker.connection.send(submit("r1", "variant"))
    tokens = worker.collect("r1")
    assert tokens[-1].finish_reason is FinishReason.LENGTH
    want = reference_greedy(reference_model(variant), list(PROMPT), 8)
    assert [token.token_id for token in tokens] == want

    worker.connection.send(submit("r2", "variant", max_tokens=200))
    worker.wait_for(StepOutput)
    worker.connection.send(Abort(request_id="r2"))
    worker.wait_for(Snapshot, lambda snapshot: snapshot.kv_usage_ratio == 0.0)
    worker.connection.send(submit("r3", "nobody"))
    assert worker.wait_for(RequestFailed).error["code"] == "model_not_found"

    worker.connection.send(UnloadModel(model="variant"))
    worker.wait_for(ModelUnloaded)
    assert "variant" not in worker.last(Snapshot).models

    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the group; the parent handles them
        worker.process.send_signal(number)
    worker.connection.send(submit("r4", "base", max_tokens=1))
    worker.collect("r4")
    worker.connection.close()
    assert worker.process.wait(TIMEOUT_S) == 0


def test_worker_heartbeat_moves_while_a_model_loads(worker: Worker, tmp_path: Path) -> None:
    base = make_checkpoint(
        tmp_path / "base", vocab_size=600, layers=6, hidden=1024, intermediate=2048
    )
    worker.wait_for(EngineReady)
    before = worker.beats()
    worker.connection.send(load_message("base", base))
    # The first report may come before anything is read.
    worker.wait_for(LoadProgress, lambda event: 0 < event.done_bytes < event.total_bytes)
    worker.wait_for(ModelLoaded)
    reports = sum(isinstance(event, LoadProgress) for event in worker.events)
    assert worker.beats() - before >= reports


def test_worker_leaves_on_shutdown_and_reports_a_bad_load(worker: Worker, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    worker.connection.send(load_message("base", base, donor="nobody"))
    assert worker.wait_for(LoadFailed).error["code"] == "model_not_found"
    worker.connection.send(Shutdown())
    assert worker.process.wait(TIMEOUT_S) == 0


def test_worker_ends_without_walking_what_it_has_imported() -> None:
    ours, theirs = socket.socketpair()
    ours.close()  # so that it leaves at once
    heartbeat_fd = os.memfd_create("heartbeat")
    os.ftruncate(heartbeat_fd, 8)
    program = (
        "import atexit, gc, runpy\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 50_000))\n"
        "runpy.run_module('linker_core.engine.worker', run_name='__main__')"
    )
    arguments = ("--socket-fd", str(theirs.fileno()), "--heartbeat-fd", str(heartbeat_fd))
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--config", SMALL.to_json()],
        pass_fds=(theirs.fileno(), heartbeat_fd),
        capture_output=True,
        text=True,
        check=False,
    )
    theirs.close()
    os.close(heartbeat_fd)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
