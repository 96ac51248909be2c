"""The scan process as the server meets it: JSON lines on stdout, one result or one error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linker_core.pace import Pace
from linker_core.sharing import worker
from linker_core.sharing.report import ScanReport
from linker_core.sharing.scan import scan
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


@pytest.mark.parametrize("fault", [RuntimeError("CUDA out of memory"), AssertionError("no CUDA")])
def test_device_that_cannot_be_used_leaves_the_scan_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    devices: list[str] = []

    def scan_on(*pair: Checkpoint, device: str, **more: Any) -> ScanReport:
        devices.append(device)
        if device != "cpu":
            raise fault
        return scan(*pair, device=device, **more)

    monkeypatch.setattr(worker, "scan", scan_on)
    result = worker.examine(variant, donor, hashed=False, scanned=True, device="cuda", pace=Pace())
    assert devices == ["cuda", "cpu"]
    assert len(ScanReport.from_json(result["report"]).blocks) == 2


def test_worker_error_is_the_last_line(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "d")
    (path / "model.safetensors").write_bytes(b"")
    status, lines = run_worker("--variant", str(path))
    assert status == 1
    assert lines[-1]["error"]["code"] == "bad_checkpoint"


def test_worker_needs_no_torch_numba_or_numpy() -> None:
    script = (
        "import sys; import linker_core.sharing.worker; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numba', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


MEASURED = """
import re, sys
from linker_core.sharing import worker
def private_bytes():
    status = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024
peak = 0
def reporter(stage):
    def report(done, total):
        global peak
        peak = max(peak, private_bytes())
    return report
worker.progress_of = reporter
status = worker.main()
print('{"peak": %d}' % max(peak, private_bytes()))
sys.exit(status)
"""


def test_worker_holds_little_memory_of_its_own(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", layers=3, hidden=1024, intermediate=5632)
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    assert (donor / "model.safetensors").stat().st_size > 100 * 2**20
    command = [sys.executable, "-c", MEASURED, "--donor", str(donor), "--variant", str(variant)]
    done = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["peak"] <= 64 * 2**20


BUSY = """
import os, sys, time
from linker_core.sharing import worker
examine = worker.examine
def examine_when_busy(*arguments, pace, **options):
    while not pace.busy:
        time.sleep(0.001)
    worker.say({"policy": os.sched_getscheduler(0)})
    return examine(*arguments, pace=pace, **options)
worker.examine = examine_when_busy
sys.exit(worker.main())
"""


def test_worker_that_hears_of_sequences_gives_way_and_ends_all_the_same(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    command = [sys.executable, "-c", BUSY, "--donor", str(donor), "--variant", str(variant)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("busy\n")
        worker.stdin.flush()
        lines = [json.loads(line) for line in worker.stdout]
    assert lines[0] == {"policy": os.SCHED_IDLE}
    assert len(ScanReport.from_json(lines[-1]["result"]["report"]).blocks) == 2


def test_worker_says_how_close_a_model_is_to_each_of_several_donors(tmp_path: Path) -> None:
    donor, stranger = make_checkpoint(tmp_path / "d"), make_checkpoint(tmp_path / "s", seed=9)
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    (gone := make_checkpoint(tmp_path / "gone") / "model.safetensors").unlink()
    near = (str(path) for path in (stranger, donor, gone.parent))
    status, lines = run_worker(
        "--variant", str(variant), *(part for path in near for part in ("--near", path))
    )
    assert status == 0
    assert {line["stage"] for line in lines[:-1]} == {"scanning"}
    result = lines[-1]["result"]
    with Checkpoint.open(variant) as v, Checkpoint.open(donor) as d:
        assert result["identity"] == [list(file) for file in v.identity]
        assert result["near"][1]["identity"] == [list(file) for file in d.identity]
    far, close, missing = result["near"]
    assert far["mean_epsilon"] > 1
    assert close["mean_epsilon"] == pytest.approx(0.01, rel=0.05)
    assert missing["identity"] is None
    assert "no model*.safetensors" in missing["error"]


def test_worker_that_compares_a_damaged_variant_ends_with_an_error(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    (variant / "model.safetensors").write_bytes(b"")
    status, lines = run_worker("--variant", str(variant), "--near", str(donor))
    assert status == 1
    assert lines[-1]["error"]["code"] == "bad_checkpoint"
