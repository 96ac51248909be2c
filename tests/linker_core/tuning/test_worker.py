"""The tuning process as the server meets it: one line in, progress and one last line out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from linker_core.pace import BUSY_LINE, IDLE_LINE
from linker_core.sharing.rungs import Rung
from linker_core.tuning import worker
from linker_core.tuning.request import TuneGoal, TuneRequest
from linker_core.tuning.result import TuneResult
from linker_core.tuning.tuner import tune
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.tuning.pairs import Pair, make_pair

COMMAND = [sys.executable, "-m", "linker_core.tuning.worker"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("worker"), layers=2)


def given_request(pair: Pair) -> TuneRequest:
    """One plan to price, which is quick."""
    rungs = {name: str(rung) for name, rung in pair.aliasing("layers.1.mlp").items()}
    return TuneRequest(
        donor=str(pair.donor.path),
        variant=str(pair.variant.path),
        report=pair.report.to_json(),
        donor_fingerprint="donor",
        goal=TuneGoal(rungs=rungs),
    )


@contextmanager
def started(request: TuneRequest, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker whose stdin stays open and whose temporary files would lie in `folder`."""
    with subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        text=True,
    ) as process:
        say(process, json.dumps(request.to_json()))
        try:
            yield process
        finally:
            process.kill()


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def lines_of(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    return (json.loads(line) for line in process.stdout)


def test_worker_reports_progress_then_what_was_tuned(pair: Pair, tmp_path: Path) -> None:
    """While its stdin stays open, and with sequences running at first."""
    request = given_request(pair)
    with started(request, tmp_path) as process:
        for word in (BUSY_LINE, IDLE_LINE, BUSY_LINE, IDLE_LINE):
            say(process, word)
        *progress, last = lines_of(process)
        assert process.wait() == 0
    assert progress
    assert {line["stage"] for line in progress} == {"tuning"}
    done = [line["done_bytes"] for line in progress]
    assert done == sorted(done)
    assert done[-1] == progress[-1]["total_bytes"]
    assert last.keys() == {"result"}
    result = last["result"]
    tuned, here = TuneResult.from_json(result["tune"]), tune(request)
    assert replace(tuned.chosen, price=here.chosen.price) == here.chosen
    assert tuned.chosen.price.kl == pytest.approx(here.chosen.price.kl, rel=1e-4)
    assert tuned.chosen.price.kl > 0
    assert tuned.chosen.rungs["model.layers.1.mlp.up_proj.weight"] is Rung.ALIAS
    for path, field in ((pair.variant.path, "identity"), (pair.donor.path, "donor_identity")):
        with Checkpoint.open(path) as checkpoint:
            assert result[field] == [list(file) for file in checkpoint.identity]


def test_worker_error_is_the_last_line(tmp_path: Path) -> None:
    broken = make_pair(tmp_path / "pair", layers=2)
    (broken.variant.path / "model.safetensors").write_bytes(b"")
    with started(given_request(broken), tmp_path) as process:
        (line,) = lines_of(process)
        assert process.wait() == 1
    assert line["error"]["code"] == "bad_checkpoint"
    assert "model.safetensors" in line["error"]["message"]


def no_memory() -> None:
    raise MemoryError


def too_much_for_torch() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("allocate", [no_memory, too_much_for_torch])
def test_lack_of_memory_is_said(
    pair: Pair,
    allocate: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(worker, "answer", lambda *_: allocate())
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(given_request(pair).to_json()) + "\n"))
    assert worker.main() == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "insufficient_capacity"


def test_fault_of_ours_is_no_lack_of_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "answer", lambda *_: torch.ones(2) @ torch.ones(3))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(given_request(pair).to_json()) + "\n"))
    with pytest.raises(RuntimeError, match="size"):
        worker.main()


def files_in(folder: Path) -> dict[Path, tuple[int, int]]:
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_worker_killed_in_the_middle_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    request = replace(given_request(pair), goal=TuneGoal(budget_kl=0.01))
    before = files_in(pair.variant.path.parent)
    with started(request, tmp_path) as process:
        say(process, BUSY_LINE)
        line = next(lines_of(process))
        assert 0 < line["done_bytes"] < line["total_bytes"]
        process.kill()
        assert process.wait() < 0
        assert process.stdout is not None
        assert "result" not in process.stdout.read()
    assert files_in(pair.variant.path.parent) == before
    assert files_in(tmp_path) == {}
