"""`linker analyze eval` on a planted family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli.main import main
from tests.analysis.planted import Planted


@pytest.fixture
def command(small_family: Planted, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("The sun rose over the hills and the sea was calm. " * 8)
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Say", "output": "it"}] * 3))
    models = [small_family.base, *list(small_family.variants.values())[:3]]
    return [
        "analyze",
        "eval",
        *map(str, models),
        f"--wikitext={tmp_path / 'text.txt'}",
        f"--instruct={tmp_path / 'alpaca.json'}",
        "--tokens=100",
        "--window=40",
        "--scales",
        "0.5",
        "1",
    ]


def test_eval_prints_every_weighting_and_model_with_changes(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main([*command, "--outputs", "--max-tokens=3", "--output-scales", "0", "1"]) == 0
    said = capsys.readouterr().out
    for text in ("sampled", "uniform", "raw_mean", "base", "one", "two", "three", "risotto",
                 "stride 20", "95% interval", "uniform weights of equal norm"):  # fmt: skip
        assert text in said


def test_eval_json_holds_scores_changes_and_the_comparison_with_uniform_weights(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--json", "--protocol=both"]) == 0
    found = json.loads(capsys.readouterr().out)
    labels = [(row["label"], row["scale"]) for row in found["conditions"]]
    kernels = [(w, s) for w in ("sampled", "uniform", "raw_mean") for s in (0.5, 1.0)]
    assert labels == [("base", 0.0), *kernels, *((n, None) for n in ("one", "two", "three"))]
    for row in found["conditions"]:
        assert row["scores"]["wikitext_sliding_window"]["perplexity"] > 1
        assert row["scores"]["wikitext_full_sequence"]["perplexity"] > 1
        assert row["scores"]["mmlu"] is None
        assert {"percent", "low", "high"} == set(row["changes"]["instruct_response"])
    assert [entry["scale"] for entry in found["against_uniform"]] == [0.5, 1.0]
    assert found["kernel"]["weighting"] == "sampled"


def test_eval_of_one_fine_tune_measures_models_but_has_no_kernel(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    one = command[:4] + command[6:]
    assert main(one) == 2
    assert "several fine-tunes" in capsys.readouterr().err
    assert main([*one, "--of=models", "--json"]) == 0
    labels = [row["label"] for row in json.loads(capsys.readouterr().out)["conditions"]]
    assert labels == ["base", "one"]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--scales", "nan"], "--scales"),
        (["--stride=40"], "--stride"),
        (["--device=nowhere"], "--device"),
        (["--instruct=/nowhere/at-all.json"], "--instruct"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    command: list[str], option: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *option]) == 2
    assert reason in capsys.readouterr().err
