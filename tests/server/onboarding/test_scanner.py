"""The scan worker as it is: what it is asked, and what a file that is cut short does to it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

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


def test_options_say_what_is_wanted() -> None:
    scanner = Scanner((sys.executable, "-c", ECHO))
    result = asyncio.run(
        scanner.run(Path("v"), donor=Path("d"), hashed=False, scanned=True, on_progress=ignore)
    )
    expected = {"arguments": ["--variant", "v", "--donor", "d", "--no-hash"]}
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
