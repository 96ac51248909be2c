"""`linker tune` and the plans that need it, with the real tuner on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from linker_core.tuning.result import TuneResult
from server.cli.main import main
from tests.tiny import make_checkpoint, make_variant


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


def test_plan_from_a_sample_of_rows_is_that_of_the_whole(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--tau-cos", "0.9", "--tau-frob", "0.1")
    whole = answer(capfd, "plan", *pair, *options)
    sampled = answer(capfd, "plan", *pair, *options, "--sample", "0.5")
    assert sampled["rungs"] == whole["rungs"]
    assert sampled["blocks_shared"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "--budget-kl", "-1"), "budget_kl"),
        (("tune", "--budget-kl", "1", "--max-bytes", "1"), "either budget_kl or max_bytes"),
        (("tune", "--calibration", "/nothing.jsonl"), "alibration"),
        (("plan", "--policy", "exact", "--budget-kl", "1"), "takes no budget_kl"),
        (("plan", "--policy", "bytes"), "needs max_bytes"),
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
