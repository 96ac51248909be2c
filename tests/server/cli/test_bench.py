from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from server.cli import bench
from server.cli.bench import decode
from server.cli.bench.scenario import Settings
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


def test_race_measures_the_scenarios_asked_for_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[Settings] = []

    def measure(settings: Settings) -> dict[str, Any]:
        asked.append(settings)
        return FIGURES

    monkeypatch.setattr(decode, "SCENARIOS", {"single": measure, "kin": measure})
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"decode single": {}, "serve single": {}}))
    arguments = ("--alone", "--rounds", "2", "--results", str(results), "--models", str(tmp_path))
    assert run("decode", "--only", "kin", "--json", *arguments) == 0
    (settings,) = asked
    assert (settings.peers, settings.rounds, settings.models) == (None, 2, tmp_path)
    found = json.loads(capfd.readouterr().out)["kin"]
    assert found["ratio"] == FIGURES["ratio"]
    assert found["machine"]["cores"] >= 1
    assert json.loads(results.read_text()) == {
        "decode single": {}, "serve single": {}, "decode kin": found
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--only", "kim"), "kin"),
        (("--rounds", "0"), "at least 1"),
        (("--tokens", "1"), "at least 2"),
    ],
)
def test_race_refuses_what_it_cannot_measure(arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        run("decode", *arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_race_ends_what_it_started_on_both_signals(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[signal.Signals] = []

    def measure(_settings: Settings) -> dict[str, Any]:
        try:
            signal.raise_signal(number)
        finally:
            ended.append(number)
        return FIGURES

    monkeypatch.setattr(decode, "SCENARIOS", {"single": measure})
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run("decode", "--alone")
    assert ended == [number]
    assert signal.getsignal(number) is before
