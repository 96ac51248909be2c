from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.cli import bench
from server.cli.main import main

FIGURES = {"ratio": 0.123456, "seconds": {"read": 2.0, "files": 3}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, Path]]:
    """What was measured, by a benchmark that knows its figures."""
    asked: list[tuple[str, Path, Path]] = []

    def benchmark(name: str) -> Any:
        def measure(donor: Path, variant: Path) -> dict[str, Any]:
            asked.append((name, donor, variant))
            return FIGURES

        return SimpleNamespace(measure=measure, SHAPE={})

    monkeypatch.setattr("server.cli.bench.importlib.import_module", benchmark)
    return asked


def run(*arguments: str) -> int:
    """Runs the command without `main`, which looks up a module by name as well."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(arguments))


def test_bench_json_is_what_the_benchmark_measured(
    asked: list[tuple[str, Path, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("scan", "/d", "/v", "--json") == 0
    assert json.loads(capfd.readouterr().out) == FIGURES
    assert asked == [("server.cli.bench.scan", Path("/d"), Path("/v"))]


@pytest.mark.usefixtures("asked")
def test_bench_table_names_nested_figures_with_dots(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "/d", "/v") == 0
    out = capfd.readouterr().out
    assert "seconds.read" in out
    assert "0.1235" in out


def test_unknown_benchmark_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "everything", "/d", "/v"])
    assert caught.value.code == 2
    assert "scan" in capfd.readouterr().err
