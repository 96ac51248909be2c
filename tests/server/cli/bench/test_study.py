from __future__ import annotations

import asyncio
import threading
from collections import deque
from pathlib import Path

import pytest

from linker_core.errors import EngineFailureError, LinkerError
from server.cli.bench.scenario import Settings
from server.cli.bench.study import _Worker, measure_decode
from server.registry.records import Json
from server.studies.files import Place, Places
from server.studies.worker import Listener, Order, StudyWorker
from tests.server.cli.bench.small import SHAPE


def test_streams_are_measured_beside_a_worker_that_works(tmp_path: Path) -> None:
    found = measure_decode(Settings(models=tmp_path, peers=None, rounds=2, tokens=8, shape=SHAPE))
    assert "serve --strict" in found["command"]
    assert len(found["alone_ms"]) == len(found["beside_ms"]) == 2
    ratios = [a / b for a, b in zip(found["alone_ms"], found["beside_ms"], strict=True)]
    assert found["rate_ratios"] == pytest.approx(ratios)
    assert min(ratios) <= found["rate_ratio"] <= max(ratios)
    assert found["num_records"] >= 2
    assert found["cpu_per_busy_s"] > 0
    assert 1 < found["peak_private_mib"] < 256


def _worker(folder: Path) -> _Worker:
    place = Place(path=folder / "none", identity=())
    places = Places(base=place, variants={"one": place})
    return _Worker(Order(base_name="base", places=places, done=deque()))


def test_worker_that_fails_before_its_first_record_is_seen(tmp_path: Path) -> None:
    with pytest.raises(LinkerError), _worker(tmp_path).at_work():
        pytest.fail("there is nothing to measure")


def test_worker_that_fails_later_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, failed = threading.Event(), threading.Event()

    async def run(_self: StudyWorker, _order: Order, listener: Listener) -> Json:
        listener.on_record("t", {})
        await asyncio.to_thread(go_on.wait, 60.0)
        failed.set()
        raise EngineFailureError("the worker is gone")

    def until_it_has_failed() -> None:
        go_on.set()
        assert failed.wait(60.0)

    monkeypatch.setattr(StudyWorker, "run", run)
    with pytest.raises(EngineFailureError, match="is gone"), _worker(tmp_path).at_work():
        until_it_has_failed()
