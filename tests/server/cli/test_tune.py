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

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.sharing.price import Price
from linker_core.sharing.rungs import parse_rung
from linker_core.tuning.request import FIT_POINTS, TuneGoal
from linker_core.tuning.result import PricedPlan, TuneResult
from linker_core.weights.checkpoint import Checkpoint
from server.cli import fit
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


def test_tune_table_of_eighty_columns_wraps_names_at_words(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [plan["origin"] for plan in answer(capfd, "tune", *pair)["frontier"]]
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["tune", *pair]) == 0
    table, _, _ = capfd.readouterr().out.partition("chosen:")
    assert max(map(len, table.splitlines())) <= 80
    words = table.split()
    assert all(word in words for name in names for word in name.split())
    assert len(table.splitlines()) <= 3 + 2 * len(names)


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


def test_plan_says_whether_donor_pages_and_variant_fit(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--policy", "exact")
    plan = answer(capfd, "plan", *pair, *options)
    assert (plan["fits"], "memory_bytes" in plan) == (None, False)
    with Checkpoint.open(Path(pair[0])) as donor:
        taken, pages = donor.nbytes, kv_cache_bytes(donor.config, EngineConfig())
    taken += plan["unique_bytes"]
    for more, kv_bytes in (((), pages), (("--kv", "1K"), 1024)):
        for short, fits in ((0, True), (1, False)):
            size = taken + kv_bytes - short
            plan = answer(capfd, "plan", *pair, *options, *more, "--memory-budget", str(size))
            assert (plan["fits"], plan["kv_bytes"], plan["memory_bytes"]) == (fits, kv_bytes, size)
            assert plan["donor_bytes"] + plan["unique_bytes"] == taken
    assert main(["plan", *pair, *options, "--memory-budget", "1"]) == 0
    assert "does not fit: donor" in " ".join(capfd.readouterr().out.split())


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


def spread_of(kls: dict[int, float]) -> TuneResult:
    """What a tuner says of plans of these sizes."""
    plans = tuple(
        PricedPlan(
            origin=f"{size} bytes",
            rungs={"model.embed_tokens.weight": parse_rung("int2:128")},
            rung_bytes={"int2": size},
            price=Price(
                kl=kl, kl_upper=2 * kl, top1=1.0, ppl_ratio=1.0, tokens=4000, calibration="t",
                matmul_precision="highest", encoding=1,
            ),
        )
        for size, kl in kls.items()
    )  # fmt: skip
    return TuneResult(
        chosen=plans[-1], frontier=plans, reference_tokens=4000, calibration="t",
        forward_passes=9.0, seconds=1.0,
    )  # fmt: skip


def test_variants_are_fitted_into_one_memory(
    pair: tuple[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    donor, near = pair
    far = str(make_variant(tmp_path / "far", Path(donor), scale=0.0))
    spreads = {near: {100: 0.02, 300: 0.0}, far: {200: 0.5, 250: 0.05, 900: 0.01}}

    def tuned(_donor: Checkpoint, variant: Checkpoint, *_: Any, goal: TuneGoal, **__: Any) -> Any:
        assert goal == TuneGoal(num_points=FIT_POINTS)
        return spread_of(spreads[str(variant.path)])

    monkeypatch.setattr(fit, "tune_pair", tuned)
    size = Checkpoint.open(Path(donor)).nbytes

    def fitted(room: int) -> dict[str, Any]:
        options = ("--kv", "1K", "--fit", str(size + 1024 + room))
        return answer(capfd, "plan", donor, near, far, *options)

    roomy, tight, beyond = fitted(1200), fitted(350), fitted(299)
    assert (roomy["fits"], roomy["donor_bytes"], roomy["kv_bytes"]) == (True, size, 1024)
    assert [model["source"] for model in roomy["models"]] == [near, far]
    assert [model["plan"]["kl"] for model in roomy["models"]] == [0.0, 0.01]
    assert [model["plan"]["kl"] for model in tight["models"]] == [0.02, 0.05]
    assert (tight["unique_bytes"], tight["left_out"]) == (350, [])
    assert (beyond["fits"], beyond["left_out"]) == (False, [far])
    assert beyond["least_bytes"] == size + 1024 + 300
    assert [model["plan"] is None for model in beyond["models"]] == [False, True]


def test_table_of_variants_says_what_does_not_fit(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["plan", *pair, "--fit", str(Checkpoint.open(Path(pair[0])).nbytes)]) == 0
    out = capfd.readouterr().out
    assert f"does not fit: {pair[1]}. All of them need" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fit", "1"), "leaves nothing"),
        (("--fit", "8G", "--budget-kl", "1"), "budget_kl has no meaning"),
        (("--fit", "8G", "--dtype", "float16"), "dtype has no meaning"),
        (("--kv", "1G"), "kv has no meaning"),
    ],
)
def test_fit_refuses_what_it_cannot_use(
    pair: tuple[str, str],
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert main(["plan", *pair, *options]) == 2
    assert message in capfd.readouterr().err
    assert main(["plan", *pair, pair[1], "--fit", "8G"]) == 2
    assert "each once" in capfd.readouterr().err


def test_plan_and_frontier_say_bits_and_rungs(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["plan", *pair, "--max-bytes", "30K"]) == 0
    lines = capfd.readouterr().out.splitlines()
    (chosen,) = (line for line in lines if "→" in line)
    assert "○" not in chosen
    assert any("all blocks" in line and "○" in line for line in lines)
    assert any("chosen:" in line and "lowrank" in line for line in lines)
    assert any(line.endswith("%") and "bits a weight:" in line for line in lines)
