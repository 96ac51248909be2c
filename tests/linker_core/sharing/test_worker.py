"""The scan process as the server meets it: JSON lines on stdout, one result or one error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from linker_core.sharing.report import ScanReport
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant


def run_worker(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "linker_core.sharing.worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_worker_reports_progress_then_fingerprints_and_scan(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    status, lines = run_worker("--donor", str(donor), "--variant", str(variant))
    assert status == 0
    assert {line["stage"] for line in lines[:-1]} == {"hashing", "scanning"}
    result = lines[-1]["result"]
    assert len(ScanReport.from_json(result["report"]).blocks) == 2
    assert result["fingerprint"] != result["donor_fingerprint"]


def test_worker_without_a_donor_only_hashes_and_checks(tmp_path: Path) -> None:
    status, lines = run_worker("--variant", str(make_checkpoint(tmp_path / "d")))
    assert status == 0
    assert lines[-1]["result"]["report"] is None


def test_worker_that_shall_not_hash_says_which_files_it_scanned(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    status, lines = run_worker("--donor", str(donor), "--variant", str(variant), "--no-hash")
    assert status == 0
    assert {line["stage"] for line in lines[:-1]} == {"scanning"}
    result = lines[-1]["result"]
    assert (result["fingerprint"], result["donor_fingerprint"]) == (None, None)
    for path, field in ((variant, "identity"), (donor, "donor_identity")):
        with Checkpoint.open(path) as checkpoint:
            assert result[field] == [list(file) for file in checkpoint.identity]
    assert len(ScanReport.from_json(result["report"]).blocks) == 2


def test_worker_error_is_the_last_line(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "d")
    (path / "model.safetensors").write_bytes(b"")
    status, lines = run_worker("--variant", str(path))
    assert status == 1
    assert lines[-1]["error"]["code"] == "bad_checkpoint"


def test_worker_needs_no_torch() -> None:
    script = (
        "import sys; import linker_core.sharing.worker; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
