"""How a study is made, resumed, stored and shown."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from linker_core.pace import Spent
from server.registry.records import Json
from server.studies.attempt import Attempt
from server.studies.families import families_of
from server.studies.worker import Listener, Order, StudyWorker
from tests.server.studies.bench import (
    AT_ONCE,
    Bench,
    Play,
    attempt,
    done_of,
    failure,
    finished,
    is_running,
)
from tests.server.studies.fake_worker import TENSORS, Behaviour, record_of


def test_study_is_made_stored_and_shown(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            study = finished(studies)
            assert study is not None
            assert study.summary == {"base": "base", "variants": {"near": {}, "far": {}}}
            assert study.variants == {"near": "of near", "far": "of far"}
            assert (study.num_tensors, study.base["name"]) == (len(TENSORS), "base")
            found = [json.loads(line) async for line in studies.records(study.key)]
            assert found == [record_of(name) for name in TENSORS]
            assert studies.spent == Spent(0.25, 0.125, 1.0, 0.5)
            await bench.looks()
        assert bench.rows() == {study.key: study}
        assert len(bench.requests()) == 1  # once is enough

    play(scenario)


def test_finished_study_is_shown_after_a_restart_and_not_made_again(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            study = finished(studies)
        async with bench.running() as again:
            await bench.until(lambda: finished(again))
            await bench.looks()
            assert finished(again) == study
        assert len(bench.requests()) == 1

    play(scenario)


@pytest.mark.parametrize("end", ["SIGKILL", "exit", "cut"])
@pytest.mark.parametrize("records", range(len(TENSORS) + 1))
def test_worker_that_dies_at_any_record_is_gone_on_from(play: Play, records: int, end: Any) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=records, end=end))
        async with bench.running() as studies:
            await bench.until(lambda: failure(studies))
            bench.tell(Behaviour())
            bench.now += AT_ONCE.backoff_s
            await bench.until(lambda: finished(studies))
            assert failure(studies) is None
        first, second = bench.requests()
        assert first["done"] == []
        assert done_of(second) == sorted(TENSORS[:records])
        [key] = bench.rows()
        assert set(bench.registry.study_tensors(key)) == set(TENSORS)

    play(scenario)


@pytest.mark.parametrize("records", range(len(TENSORS) + 1))
def test_server_that_stops_at_any_record_goes_on_at_its_next_start(
    play: Play, records: int
) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=records, end="wait"))
        async with bench.running() as studies:
            await bench.until(lambda: (a := attempt(studies)) and len(a.done) == records)
            await bench.until(bench.requests)
        assert not is_running(bench.requests()[0]["pid"])
        bench.tell(Behaviour())
        async with bench.running() as again:
            await bench.until(lambda: finished(again))
        assert done_of(bench.requests()[1]) == sorted(TENSORS[:records])

    play(scenario)


def test_rows_are_stored_while_a_worker_works(play: Play) -> None:
    """So that a server which is killed has lost next to nothing."""

    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=2, end="wait"))

        def stored() -> bool:
            return any(len(bench.registry.study_tensors(key)) == 2 for key in bench.rows())

        async with bench.running():
            await bench.until(stored)

    play(scenario)


class SaysOneRecord(StudyWorker):
    async def run(self, _order: Order, listener: Listener) -> Json:
        listener.on_record(TENSORS[0], record_of(TENSORS[0]))
        return {}


def test_rows_are_never_stored_twice_at_once(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop cancels a call that stores rows, and stores what there is."""

    async def scenario(bench: Bench) -> None:
        family = families_of(bench.roster.models())["base"]
        one = Attempt(family, family.new_study(at=1.0), bench.registry)
        await one.run(bench.folders, SaysOneRecord())
        began, again = threading.Event(), threading.Event()
        overlapped: list[bool] = []
        save = bench.registry.save_study_tensors

        def slow(key: str, records: Mapping[str, Json]) -> None:
            (again if began.is_set() else began).set()
            if not overlapped:
                overlapped.append(again.wait(0.5))
            save(key, records)

        monkeypatch.setattr(bench.registry, "save_study_tensors", slow)
        first = asyncio.ensure_future(one.flush())
        assert await asyncio.to_thread(began.wait, 60.0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await one.flush()
        assert overlapped == [False]
        assert bench.registry.study_tensors(one.study.key) == [TENSORS[0]]

    play(scenario)


def test_study_that_is_damaged_in_the_registry_is_made_again(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
        with bench.registry._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE studies SET summary = '{', variants = ''")
            connection.exec_driver_sql("UPDATE study_tensors SET record = 'x' WHERE rowid = 1")
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
        assert len(done_of(bench.requests()[1])) == len(TENSORS) - 1

    play(scenario)
