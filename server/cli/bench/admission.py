"""Seconds of an admission, stage by stage, beside loading the same model with transformers.

A server is started with the donor; the variant is onboarded into it as any client would, with
nothing known of it (cold) and again with its stored scan (warm).
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx
import torch
from transformers import AutoModelForCausalLM

from linker_core.errors import LinkerError
from linker_core.weights.checkpoint import Checkpoint
from server.cli.bench.pair import HALF_BILLION

SHAPE: Final = HALF_BILLION
_HOST: Final = "127.0.0.1"
_TIMEOUT_S: Final = 600
_POLL_S: Final = 0.05
_COMPLAINT: Final = re.compile(r" (WARNING|ERROR) |^linker serve: ")
_VARIANT: Final = "variant"


def measure(donor: Path, variant: Path, *, rounds: int = 3) -> dict[str, Any]:
    """Onboards and loads in turn; medians of the rounds, ratios within this run.

    Args:
        donor: A checkpoint with a tokenizer.
        variant: Another of the same family.
        rounds: How often each is done.
    """
    plain: list[float] = []
    cold: list[dict[str, float]] = []
    warm: list[dict[str, float]] = []
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    for _ in range(rounds):
        touch_free_memory(copy_bytes(variant))
        plain.append(load_plainly(variant))
        with _serving(donor, variant) as client:
            touch_free_memory(copy_bytes(variant))
            cold.append(_onboard(client, variant))
            client.delete(f"/models/{_VARIANT}").raise_for_status()
            warm.append(_onboard(client, variant))
    from_pretrained = median(plain)
    result: dict[str, Any] = {"from_pretrained_seconds": from_pretrained}
    for name, runs in (("cold", cold), ("warm", warm)):
        stages = {stage: median(run[stage] for run in runs) for stage in runs[0]}
        unhashed = stages["total"] - stages["hash"]
        result[name] = {
            "seconds": stages,
            "with_hash_over_from_pretrained": stages["total"] / from_pretrained,
            "over_from_pretrained": unhashed / from_pretrained,
        }
    return result


def copy_bytes(path: Path) -> int:
    """Returns what a whole model takes in the engine's dtype."""
    with Checkpoint.open(path) as checkpoint:
        return sum(4 * math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def touch_free_memory(nbytes: int) -> None:
    """Writes to free memory and gives it back.

    What a virtual machine has handed to its host is several times slower to touch first; both sides
    shall find it touched.
    """
    torch.empty(nbytes, dtype=torch.uint8).fill_(1)


def load_plainly(path: Path) -> float:
    """Loads a model in the engine's dtype with every page in place; returns the seconds."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.view(-1)[:: os.sysconf("SC_PAGE_SIZE") // 4].sum()
    return time.perf_counter() - started


def _onboard(client: httpx.Client, variant: Path) -> dict[str, float]:
    """Onboards the variant; returns the job's seconds by stage and the client's `total`."""
    body = {
        "name": _VARIANT,
        "source": str(variant.resolve()),
        "donor": "donor",
        "policy": "thresholds",
    }
    started = time.perf_counter()
    client.post("/models", params={"wait": "true"}, json=body).raise_for_status()
    total = time.perf_counter() - started
    (job, *_) = client.get("/models/jobs").raise_for_status().json()["data"]
    seconds: Mapping[str, float] = job["result"]["seconds"]
    return {**seconds, "total": total}


@contextmanager
def _serving(donor: Path, variant: Path) -> Iterator[httpx.Client]:
    """Runs a server with a registry of its own that holds the donor."""
    root = os.path.commonpath([donor.resolve(), variant.resolve()])
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as state:
        command = [
            *(sys.executable, "-m", "server.cli.main", "serve", "--strict", "--models-root", root),
            *("--state", state, "--port", str(port), "--model", f"donor={donor.resolve()}"),
        ]
        log = Path(state) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            url = f"http://{_HOST}:{port}"
            with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
                _wait_until_ready(client, process, log)
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _wait_until_ready(
    client: httpx.Client,
    process: subprocess.Popen[bytes],
    log: Path,
    *,
    timeout_s: float = _TIMEOUT_S,
) -> None:
    """Waits until the donor is served.

    Raises:
        LinkerError: The server ended, which it does where the donor cannot be onboarded, or the
            time is over; the message ends with what the server complained of.
    """
    give_up_at = time.monotonic() + timeout_s
    while True:
        if process.poll() is not None:
            raise LinkerError(f"The server ended before it was ready. {_complaints(log)}")
        if time.monotonic() >= give_up_at:
            raise LinkerError(f"The server was not ready in {timeout_s:g} s. {_complaints(log)}")
        try:
            if client.get("/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(_POLL_S)


def _complaints(log: Path) -> str:
    """Returns the first warning or error of a server's log, else its last line."""
    lines = log.read_text("utf-8", "replace").splitlines()
    return next((line for line in lines if _COMPLAINT.search(line)), lines[-1] if lines else "")
