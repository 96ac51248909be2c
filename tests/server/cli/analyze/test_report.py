"""`linker analyze report`: one file, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

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
