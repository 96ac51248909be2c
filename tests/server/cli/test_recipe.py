"""`linker tune --recipe paper`: one JSON document or one table, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli.main import main
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    donor = make_checkpoint(tmp_path / "d")
    return str(donor), str(make_variant(tmp_path / "v", donor, scale=0.04))


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"goal": f"{n}", "sol1": "yes", "sol2": "no", "label": n % 2} for n in range(8)]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"query": f"{n} is", "choices": ["odd", "even"], "label": n % 2} for n in range(8)]
    (folder / "arc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_recipe_json_is_one_document_with_its_plans(
    pair: tuple[str, str], tasks: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "paper", "--tasks", tasks, "--limit", "6", "--quality-budget", "0.5"]
    assert main(["tune", *pair, *arguments, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["quality_budget"] == 0.5
    assert [plan["step"] for plan in record["plans"]] == ["default", "fit", "sweep"]
    assert {name: task["num_examples"] for name, task in record["tasks"].items()} == {
        "piqa": 6,
        "arc": 6,
    }
    assert record["plans"][1]["blocks_shared"] == 2
    assert record["plans"][1]["kl"] > 0


def test_recipe_table_names_every_step_and_the_over_promise(
    pair: tuple[str, str],
    tasks: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["tune", *pair, "--recipe", "paper", "--tasks", tasks]) == 0
    shown = capfd.readouterr().out
    for text in ("default (conservative)", "fit (fit)", "sweep (sweep)", "points", "of 8 right"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--recipe", "paper"], "name their directory with --tasks"),
        (["--recipe", "paper", "--tasks", "TASKS", "--budget-kl", "0.1"], "--budget-kl has no"),
        (["--recipe", "paper", "--tasks", "TASKS", "--max-bytes", "1M"], "--max-bytes has no"),
        (["--recipe", "paper", "--tasks", "TASKS", "--quality-budget", "2"], "quality_budget is"),
        (["--recipe", "paper", "--tasks", "TASKS", "--limit", "0"], "limit is 0"),
        (["--recipe", "paper", "--tasks", "/dev/null"], "cannot be read"),
        (["--tasks", "TASKS"], "--tasks has no meaning without --recipe"),
        (["--limit", "3"], "--limit has no meaning without --recipe"),
        (["--quality-budget", "0.1"], "--quality-budget has no meaning without --recipe"),
    ],
)
def test_argument_that_makes_no_sense_is_refused(
    pair: tuple[str, str],
    tasks: str,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    given = [tasks if argument == "TASKS" else argument for argument in arguments]
    assert main(["tune", *pair, *given, "--json"]) == 2
    captured = capfd.readouterr()
    assert reason in captured.err
    assert not captured.out
