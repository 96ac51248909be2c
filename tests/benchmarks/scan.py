"""The scan's rate beside the rate at which this machine reads the same files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint

_READ_BYTES = 1 << 20


class Rates(NamedTuple):
    """Bytes a second over both checkpoints; best of the rounds."""

    read: float  # one thread, pread into one buffer
    scan: float
    fingerprint: float


def measure(donor: Path, variant: Path, *, rounds: int = 3) -> Rates:
    """Reads, scans and hashes a pair in turn."""
    reads, scans, hashes = [], [], []
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        total = a.nbytes + b.nbytes
        for _ in range(rounds):
            reads.append(total / _seconds(lambda: _read(a, b)))
            scans.append(total / _seconds(lambda: scan(a, b)))
            hashes.append(total / _seconds(lambda: [fingerprint(c) for c in (a, b)]))
    return Rates(max(reads), max(scans), max(hashes))


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _read(*checkpoints: Checkpoint) -> None:
    buffer = memoryview(bytearray(_READ_BYTES))
    for checkpoint in checkpoints:
        for shard in range(len(checkpoint.shard_names)):
            offset = 0
            while count := checkpoint.read_file_bytes(shard, buffer, offset=offset):
                offset += count
