"""The encoding process as the server meets it: one line in, progress and one last line out."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linker_core.pace import BUSY_LINE, IDLE_LINE
from linker_core.residency import worker
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.sharing.plan import SharePlan
from tests.linker_core.sharing.delta_edits import write_small
from tests.lora import make_adapter

COMMAND = [sys.executable, "-m", "linker_core.residency.worker"]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("deltas"))


def ask(task: dict[str, Any], *lines: str) -> tuple[int, list[dict[str, Any]]]:
    """Returns the status and what was said, with more lines on stdin after the task."""
    process = subprocess.run(
        COMMAND,
        input="\n".join([json.dumps(task), *lines, ""]),
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        check=False,
    )
    return process.returncode, [json.loads(line) for line in process.stdout.splitlines()]


def encode_task(honest: Path, target: Path) -> dict[str, Any]:
    with DeltaFile.open(honest) as delta:
        plan = delta.plan.to_json()
    return {
        "task": "encode",
        "donor": str(honest.parent / "donor"),
        "variant": str(honest.parent / "variant"),
        "plan": plan,
        "target": str(target),
    }


def assert_described(result: dict[str, Any], path: Path) -> None:
    with DeltaFile.open(path) as delta:
        assert result == {
            "plan": delta.plan.to_json(),
            "identity": [list(entry) for entry in delta.identity],
            "fingerprint": delta.fingerprint,
            "nbytes": delta.nbytes,
        }


def test_encode_reports_progress_then_what_was_written(honest: Path, tmp_path: Path) -> None:
    """With sequences running at first."""
    target = tmp_path / "out"
    status, said = ask(encode_task(honest, target), BUSY_LINE, IDLE_LINE)
    assert status == 0
    *progress, last = said
    assert progress
    assert {line["stage"] for line in progress} == {"encoding"}
    assert progress[-1]["done_bytes"] == progress[-1]["total_bytes"]
    assert_described(last["result"], target)
    assert (target / DELTA_FILE).read_bytes() == (honest / DELTA_FILE).read_bytes()


def test_adapter_becomes_a_delta(honest: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", honest.parent / "donor")
    status, said = ask(
        {
            "task": "adapter",
            "donor": str(honest.parent / "donor"),
            "donor_fingerprint": "d" * 64,
            "adapter": str(adapter),
            "target": str(tmp_path / "out"),
        }
    )
    assert status == 0
    assert said[0]["stage"] == "encoding"
    assert_described(said[-1]["result"], tmp_path / "out")
    assert SharePlan.from_json(said[-1]["result"]["plan"]).donor_fingerprint == "d" * 64


def test_verify_reads_everything(honest: Path) -> None:
    donor = str(honest.parent / "donor")
    status, said = ask({"task": "verify", "delta": str(honest), "donor": donor})
    assert status == 0
    assert said[0]["stage"] == "verifying"
    assert said[-2]["done_bytes"] == said[-1]["result"]["nbytes"]
    assert_described(said[-1]["result"], honest)


def test_refusals_are_errors_with_a_code(honest: Path, tmp_path: Path) -> None:
    donor, path = str(honest.parent / "donor"), tmp_path / "delta"
    path.mkdir()
    for file in honest.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    content = bytearray((path / DELTA_FILE).read_bytes())
    content[-1] ^= 1
    (path / DELTA_FILE).write_bytes(content)
    status, said = ask({"task": "verify", "delta": str(path), "donor": donor})
    assert status == 1
    assert said[-1]["error"]["code"] == "bad_checkpoint"
    status, said = ask(encode_task(honest, tmp_path / "absent" / "out"))
    assert status == 1
    assert said[-1]["error"]["code"] == "invalid_request_error"
    (tmp_path / "taken").mkdir()
    status, said = ask(encode_task(honest, tmp_path / "taken"))
    assert (status, said[-1]["error"]["code"]) == (1, "conflict")


def no_memory() -> None:
    raise MemoryError


def too_much_for_torch() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("allocate", [no_memory, too_much_for_torch])
def test_lack_of_memory_is_said(
    allocate: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(worker, "perform", lambda *_: allocate())
    monkeypatch.setattr("sys.stdin", io.StringIO("{}\n"))
    assert worker.main() == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "insufficient_capacity"


def test_fault_of_ours_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "perform", lambda *_: torch.ones(2) @ torch.ones(3))
    monkeypatch.setattr("sys.stdin", io.StringIO("{}\n"))
    with pytest.raises(RuntimeError, match="size"):
        worker.main()


def test_killed_worker_leaves_at_most_an_incomplete_folder(honest: Path, tmp_path: Path) -> None:
    task = encode_task(honest, tmp_path / "out")
    with subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{BUSY_LINE}\n".join([json.dumps(task) + "\n", ""]))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["stage"] == "encoding"
        process.send_signal(signal.SIGKILL)
    names = [path.name for path in tmp_path.iterdir()]
    assert all(name == "out" or name.startswith(".incomplete-out-") for name in names)
    status, said = ask(task)
    assert status == 0
    assert_described(said[-1]["result"], tmp_path / "out")


def test_worker_that_nobody_hears_ends_quietly(honest: Path, tmp_path: Path) -> None:
    hears, says = os.pipe()
    os.close(hears)
    process = subprocess.run(
        COMMAND,
        input=json.dumps(encode_task(honest, tmp_path / "out")) + "\n",
        stdout=says,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        check=False,
    )
    os.close(says)
    assert (process.returncode, process.stderr) == (1, "")
    assert list(tmp_path.iterdir()) == []
