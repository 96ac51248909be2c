"""The scan worker as it is: what it is asked, and what a file that is cut short does to it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from linker_core.errors import BadCheckpointError
from linker_core.weights.checkpoint import Checkpoint
from server.onboarding.scanner import Scanner, ScanResult
from tests.tiny import make_checkpoint, make_variant

ECHO = (
    "import json, sys\n"
    "result = {'fingerprint': None, 'report': {'arguments': sys.argv[1:]}}\n"
    "print(json.dumps({'result': result}), flush=True)"
)


def ignore(_stage: str, _done: int, _total: int) -> None:
    pass


@pytest.mark.parametrize(("device", "more"), [("cpu", []), ("cuda", ["--device", "cuda"])])
def test_options_say_what_is_wanted(device: str, more: list[str]) -> None:
    scanner = Scanner((sys.executable, "-c", ECHO), device=device)
    result = asyncio.run(
        scanner.run(Path("v"), donor=Path("d"), hashed=False, scanned=True, on_progress=ignore)
    )
    expected = {"arguments": ["--variant", "v", "--donor", "d", "--no-hash", *more]}
    assert result == ScanResult(fingerprint=None, report=expected)


def test_pair_is_hashed_and_scanned(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    result = asyncio.run(Scanner().run(variant, donor=donor, on_progress=ignore))
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        assert (result.identity, result.donor_identity) == (b.identity, a.identity)
    assert result.fingerprint is not None
    assert result.report is not None
    assert len(result.report["blocks"]) == 2


def test_several_donors_are_compared_in_their_order(tmp_path: Path) -> None:
    donor, stranger = make_checkpoint(tmp_path / "d"), make_checkpoint(tmp_path / "s", seed=9)
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    missing = tmp_path / "missing"
    identity, found = asyncio.run(
        Scanner().compare(variant, [donor, missing, stranger], on_progress=ignore)
    )
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        assert (identity, found[0].identity) == (b.identity, a.identity)
    near, gone, far = found
    assert near.mean_epsilon is not None
    assert far.mean_epsilon is not None
    assert near.mean_epsilon < 0.1 < far.mean_epsilon
    assert (gone.identity, gone.mean_cos) == (None, None)
    assert gone.error is not None


CUT_SHORT = """
import os, sys
from linker_core.pace import Pace
from linker_core.sharing import pieces, worker
pieces.PIECE_ELEMENTS = 1 << 12
path = sys.argv[sys.argv.index("--variant") + 1]
def cut_short(done, total):
    os.truncate(os.path.join(path, "model.safetensors"), 1 << 13)
worker.progress_of = lambda stage: cut_short
sys.exit(worker.main())
"""


def test_file_cut_short_during_the_scan_is_a_bad_checkpoint(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    assert (variant / "model.safetensors").stat().st_size > 10 << 13
    scanner = Scanner((sys.executable, "-c", CUT_SHORT))
    with pytest.raises(BadCheckpointError, match="cut short"):
        asyncio.run(scanner.run(variant, donor=donor, hashed=False, on_progress=ignore))
