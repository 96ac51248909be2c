"""`linker analyze report`: one file, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from analysis.report.included import HEADINGS
from server.cli.analyze import STUDIES
from server.cli.main import EXIT_INTERRUPTED, EXIT_USAGE, main
from tests.analysis.planted import Planted
from tests.analysis.report.reading import Reading


def words(planted: Planted, target: Path) -> list[str]:
    models = [planted.base, *planted.variants.values()]
    return ["analyze", "report", *map(str, models), "--draws", "40", "-o", str(target)]


def test_report_is_one_file_of_the_whole_study(
    small_family: Planted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.html"
    target.write_text("an older one")
    assert main([*words(small_family, target), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said == {"path": str(target), "bytes": target.stat().st_size, "notes": []}
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    read = Reading(target.read_text("utf-8"))
    assert read.addresses == []
    assert len(read.plots) == len(read.specs["figures"]) == 9
    for heading in ("What the fine-tunes share", "Stability", "Kernel", "Diagnostics", "Method"):
        assert heading in read.headings
    assert str(small_family.base) not in target.read_text("utf-8")  # others may be shown the file


def test_report_holds_what_other_studies_printed(
    small_family: Planted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sun rose over the hills and the sea was calm. " * 20)
    models = [str(small_family.base), *map(str, list(small_family.variants.values())[:2])]
    kernel = [*models, "--tensors", "*.0.mlp.*"]
    walked = [*models, "--text", str(text), "--tokens", "16", "--sequences", "2"]
    studies = {
        "kernel": ["kernel", *kernel],
        "eval": ["eval", *kernel, "--wikitext", str(text), "--tokens", "60", "--scales", "1"],
        "low-rank": ["probe", "low-rank", *models, "--tolerance", "0.5"],
        "amplification": ["probe", "amplification", *walked],
        "interpolation": ["probe", "interpolation", *walked, "--steps", "2"],
    }
    target, options = tmp_path / "report.html", []
    for name, study in studies.items():
        assert main(["analyze", *study, "--json"]) == 0
        (tmp_path / f"{name}.json").write_text(capfd.readouterr().out)
        options += ["--include", str(tmp_path / f"{name}.json")]
    assert main([*words(small_family, target), *options]) == 0
    read = Reading(target.read_text("utf-8"))
    places = [read.headings.index(heading) for heading in (
        "Diagnostics", "Kernel (kernel.json)", "Evaluation (eval.json)", "Probe (low-rank.json)",
        "Probe (amplification.json)", "Probe (interpolation.json)", "Tensors",
    )]  # fmt: skip
    assert places == sorted(places)
    # Of the study itself, the kernel's weights and strategies, eval along the kernel and of models,
    # one of all variants' growth, and one of each variant's lines.
    assert len(read.plots) == len(read.specs["figures"]) == 9 + 2 + 2 + 1 + 2
    assert any(row[:2] == ["sampled", "1"] for row in read.rows)
    assert str(tmp_path) not in target.read_text("utf-8")


def test_report_includes_every_study_but_itself() -> None:
    assert {*HEADINGS, "report"} == {*STUDIES}


def test_report_refuses_a_wrong_file_before_it_studies(
    small_family: Planted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    target = tmp_path / "report.html"
    missing = ["nowhere", "at all", "-o", str(target), "--include", str(wrong)]
    assert main(["analyze", "report", *missing]) == EXIT_USAGE
    assert "--include wrong.json: no made_by" in capfd.readouterr().err
    assert main([*words(small_family, target), "--include", str(tmp_path / "no")]) == EXIT_USAGE
    assert not target.exists()


def test_report_that_cannot_be_written_leaves_nothing(
    small_family: Planted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words(small_family, tmp_path / "nowhere" / "report.html")) == EXIT_USAGE
    assert "cannot be written" in capfd.readouterr().err
    occupied = tmp_path / "report.html"
    occupied.mkdir()
    assert main(words(small_family, occupied)) == EXIT_USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_that_is_interrupted_leaves_nothing(
    small_family: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_descriptor: int, _mode: int) -> None:
        assert len(list(tmp_path.glob(".report.html.*"))) == 1  # all is written, under this name
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fchmod", interrupted)
    assert main(words(small_family, tmp_path / "report.html")) == EXIT_INTERRUPTED
    assert list(tmp_path.iterdir()) == []
