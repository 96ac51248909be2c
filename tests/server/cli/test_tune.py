"""`linker tune` and the plans that need it, with the real tuner on tiny models."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from linker_core.tuning.result import TuneResult
from server.cli.main import EXIT_INTERRUPTED, main
from tests.tiny import make_checkpoint, make_variant

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("tuned")
    donor = make_checkpoint(root / "d", tie=False)
    return str(donor), str(make_variant(root / "v", donor, scale=0.01))


def answer(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    record: dict[str, Any] = json.loads(capfd.readouterr().out)
    return record


def test_tune_json_is_the_result_and_nothing_else(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    record = answer(capfd, "tune", *pair, "--budget-kl", "0.02")
    assert TuneResult.from_json(record).to_json() == record
    assert record["chosen"]["kl_upper"] <= 0.02
    assert record["reference_tokens"] >= 4000
    assert record["chosen"] in record["frontier"]
    sizes = [point["unique_bytes"] for point in record["frontier"]]
    assert sizes == sorted(sizes)


def test_tune_by_size_stays_within_it(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    whole = answer(capfd, "tune", *pair)["frontier"][-1]["unique_bytes"]
    record = answer(capfd, "tune", *pair, "--max-bytes", str(whole * 3 // 4))
    assert record["chosen"]["unique_bytes"] <= whole * 3 // 4


def test_tune_table_marks_the_choice(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["tune", *pair]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sum("→" in line for line in lines) == 1
    assert any("identical bytes alone" in line for line in lines)
    assert "response tokens" in lines[-1]


def test_users_text_is_measured_on_beside_the_shipped(
    pair: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "mine.jsonl"
    text.write_text(json.dumps({"text": "It was a bright cold day in April."}))
    plain = answer(capfd, "tune", *pair)
    mine = answer(capfd, "tune", *pair, "--calibration", str(text))
    assert mine["calibration"] != plain["calibration"]


def test_plan_holds_the_budget_unless_told_otherwise(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    plan = answer(capfd, "plan", *pair)
    assert (plan["policy"], plan["budget_kl"]) == ("budget", 0.01)
    assert plan["price"]["kl_upper"] <= 0.01
    points = plan["frontier"]
    assert plan["unique_bytes"] in [point["unique_bytes"] for point in points]
    priced = answer(capfd, "plan", *pair, "--tau-cos", "0.9", "--tau-frob", "0.1",
                    "--budget-kl", "0.5")  # fmt: skip
    assert (priced["policy"], priced["blocks_shared"]) == ("thresholds", 2)
    assert 0 < priced["price"]["kl"] < 0.5


@pytest.mark.parametrize(
    ("options", "precision"), [((), "highest"), (("--matmul-precision", "medium"), "medium")]
)
def test_prices_are_of_the_precision_asked_for(
    pair: tuple[str, str],
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    precision: str,
) -> None:
    record = answer(capfd, "tune", *pair, *options)
    assert {point["matmul_precision"] for point in record["frontier"]} == {precision}
    assert answer(capfd, "plan", *pair, *options)["price"]["matmul_precision"] == precision


def test_plan_from_a_sample_of_rows_is_that_of_the_whole(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--tau-cos", "0.9", "--tau-frob", "0.1")
    whole = answer(capfd, "plan", *pair, *options)
    sampled = answer(capfd, "plan", *pair, *options, "--sample", "0.5")
    assert sampled["rungs"] == whole["rungs"]
    assert sampled["blocks_shared"] == 2


def test_plan_says_whether_it_fits_what_is_free(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--policy", "exact")
    plan = answer(capfd, "plan", *pair, *options)
    assert (plan["fits"], plan["free_bytes"]) == (None, None)
    size = plan["unique_bytes"]
    for free_bytes, fits in ((size, True), (size - 1, False)):
        plan = answer(capfd, "plan", *pair, *options, "--memory-budget", str(free_bytes))
        assert (plan["fits"], plan["free_bytes"]) == (fits, free_bytes)
    assert main(["plan", *pair, *options, "--memory-budget", "1"]) == 0
    assert "does not fit" in capfd.readouterr().out


def test_interrupt_ends_the_tuner_and_leaves_no_traceback(pair: tuple[str, str]) -> None:
    command = (sys.executable, "-m", "server.cli.main", "tune", *pair)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        worker = tuner_of(process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == EXIT_INTERRUPTED
    assert not worker.is_running()
    assert "Traceback" not in err


def tuner_of(process: subprocess.Popen[str]) -> psutil.Process:
    """Waits for a command's tuner to run."""
    give_up_at = time.monotonic() + DEADLINE_S
    while True:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "linker_core.tuning.worker" in child.cmdline():
                    return child
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "--budget-kl", "-1"), "budget_kl"),
        (("tune", "--budget-kl", "1", "--max-bytes", "1"), "either budget_kl or max_bytes"),
        (("tune", "--calibration", "/nothing.jsonl"), "alibration"),
        (("plan", "--policy", "exact", "--budget-kl", "1"), "takes no budget_kl"),
        (("plan", "--policy", "bytes"), "needs max_bytes"),
        (("plan", "--budget-kl", "nan"), "budget_kl is nan"),
        (("plan", "--policy", "exact", "--calibration", "self"), "--calibration says how"),
        (("plan", "--tau-cos", "0.9", "--tau-frob", "0.1", "--device", "cpu"), "--device says how"),
        (("plan", "--budget-kl", "0", "--device", "cpu"), "--device says how"),
        (
            ("plan", "--policy", "exact", "--matmul-precision", "medium"),
            "--matmul-precision says how",
        ),
        (("plan", "--sample", "0.5"), "--policy thresholds"),
        (("plan", "--sample", "0.5", "--policy", "exact"), "--policy thresholds"),
        (("plan", "--tau-cos", "0.9", "--tau-frob", "0.1", "--budget-kl", "0"), "The plan costs"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(
    pair: tuple[str, str],
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    command, *options = arguments
    assert main([command, *pair, *options]) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
