from __future__ import annotations

import os
from pathlib import Path

import pytest

from linker_core.weights.checkpoint import Checkpoint
from server.cli.bench.scan import measure
from tests.tiny import make_checkpoint, make_variant


def test_measure_gives_ratios_of_what_it_timed(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    found = measure(donor, variant, rounds=1)
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        assert found["total_bytes"] == a.nbytes + b.nbytes
    seconds = found["seconds"]
    assert found["scan_over_read"] == seconds["read"] / seconds["scan"]
    assert found["scan_over_torch"] == seconds["torch_scan"] / seconds["scan"]
    both = seconds["scan"] + seconds["hash"]
    assert found["scan_and_hash_over_read"] == pytest.approx(seconds["read"] / both)
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert 1.0 < found["worker"]["peak_private_mib"] < 64.0
    assert found["worker"]["scan_seconds"] < found["worker"]["seconds"]
