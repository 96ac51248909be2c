"""A scan's rate beside a streaming read of the same files, a plain torch scan, and its memory.

All in one run over the page cache, so that the ratios mean something on any machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from linker_core.residency.loader import read_tensor
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint
from server.cli.bench.memory import private_bytes
from server.cli.bench.pair import HALF_BILLION
from server.onboarding.processes import worker_environment
from server.onboarding.scanner import SCAN_COMMAND

SHAPE: Final = HALF_BILLION
_READ_WORDS = 1 << 18  # of 64 bits, at a time
_SAMPLE_S = 0.002


def measure(donor: Path, variant: Path, *, rounds: int = 5) -> dict[str, Any]:
    """Reads, scans and hashes a pair in turn; the best of the rounds counts.

    The scan runs in this process through maps, as the worker runs it; the worker itself is started
    for its times and its memory.

    Args:
        donor: A checkpoint that this process may map: nobody else writes to it.
        variant: Another of the same family.
        rounds: How often each is done.
    """
    seconds: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds.setdefault(what, []).append(time.perf_counter() - started)

    for round_number in range(rounds):
        # Opened anew each time, since a second pass over a map finds its pages in place.
        with _pair(donor, variant) as (a, b):
            total_bytes = a.nbytes + b.nbytes
            timed("read", lambda a=a, b=b: read_all(a, b))  # type: ignore[misc]
        with _pair(donor, variant) as (a, b):
            timed("scan", lambda a=a, b=b: scan(a, b, mapped=True))  # type: ignore[misc]
            timed("hash", lambda b=b: fingerprint(b, mapped=True))  # type: ignore[misc]
        with _pair(donor, variant) as (a, b):
            timed("buffered_scan", lambda a=a, b=b: scan(a, b))  # type: ignore[misc]
            if round_number < 2:
                timed("torch_scan", lambda a=a, b=b: _scan_with_torch(a, b))  # type: ignore[misc]
    best = {what: min(times) for what, times in seconds.items()}
    both = min(map(sum, zip(seconds["scan"], seconds["hash"], strict=True)))
    return {
        "total_bytes": total_bytes,
        "num_cores": len(os.sched_getaffinity(0)),
        "seconds": best,
        "scan_over_read": best["read"] / best["scan"],
        "scan_and_hash_over_read": best["read"] / both,
        "scan_over_torch": best["torch_scan"] / best["scan"],
        "worker": min(
            (_run_worker(donor, variant) for _ in range(rounds)), key=lambda run: run["seconds"]
        ),
    }


@contextlib.contextmanager
def _pair(donor: Path, variant: Path) -> Any:
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        yield a, b


def read_all(*checkpoints: Checkpoint) -> None:
    """Sums the mapped files on all cores: how fast this machine reads them at all."""
    parts = []
    for checkpoint in checkpoints:
        for shard in range(len(checkpoint.shard_names)):
            mapped = checkpoint.map_file(shard)
            words = np.frombuffer(mapped, np.uint64, count=len(mapped) // 8)
            parts += [words[i : i + _READ_WORDS] for i in range(0, words.size, _READ_WORDS)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        assert sum(pool.map(lambda part: int(part.sum()) & 1, parts)) >= 0


def _scan_with_torch(donor: Checkpoint, variant: Checkpoint) -> None:
    """Cosine and ε of each tensor with float32 copies, as one would write it first."""
    cpu = torch.device("cpu")
    for name in variant.tensors:
        a = read_tensor(donor, name, device=cpu).float().flatten()
        b = read_tensor(variant, name, device=cpu).float().flatten()
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
        epsilon = (b - a).norm() / a.norm()
        assert math.isfinite(cosine + epsilon)


def _run_worker(donor: Path, variant: Path) -> dict[str, float]:
    """Scans in the worker; returns its wall time, the scan's own, and its private memory's peak."""
    command = [*SCAN_COMMAND, "--donor", str(donor), "--variant", str(variant), "--no-hash"]
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=worker_environment(),
    ) as worker:
        assert worker.stdout is not None
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(worker.stdout.readlines)
            peak_bytes = 0
            while not answer.done():
                peak_bytes = max(peak_bytes, private_bytes(worker.pid))
                time.sleep(_SAMPLE_S)
        wall_s = time.perf_counter() - started
    report = json.loads(answer.result()[-1])["result"]["report"]
    return {
        "seconds": wall_s,
        "scan_seconds": report["scan_seconds"],
        "peak_private_mib": peak_bytes / 2**20,
    }
