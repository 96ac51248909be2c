"""Studies that fail, and when they are tried again."""

from __future__ import annotations

from typing import Any

import pytest

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    NotReadyError,
)
from server.registry import database
from tests.server.studies.bench import (
    AT_ONCE,
    Bench,
    Play,
    error_of,
    failure,
    finished,
    is_running,
)
from tests.server.studies.fake_worker import Behaviour


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the registry give up on a lock at once."""
    settings = (*database._SETTINGS["sqlite"], "PRAGMA busy_timeout=10")
    monkeypatch.setattr(database, "_SETTINGS", {**database._SETTINGS, "sqlite": settings})


def test_failures_are_tried_again_later_and_later(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=0, end="exit"))
        async with bench.running() as studies:
            waits = []
            for times in range(1, 5):
                await bench.until(lambda: (f := failure(studies)) and f.times == times)  # noqa: B023
                found = failure(studies)
                assert found is not None
                assert isinstance(found.error, EngineFailureError)
                wait = studies.retry_in_s(studies.families()["base"])
                waits.append(wait)
                bench.now += wait - 0.5
                await bench.looks()
                assert len(bench.requests()) == times  # not yet
                bench.now += 0.5
            assert waits == [60.0, 120.0, 200.0, 200.0]

    play(scenario)


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(records=1, end="error"), BadCheckpointError),
        (Behaviour(records=1, end="error", error="unsupported_format"), LinkerError),
        (Behaviour(records=1, end="error", error="invalid_request_error"), LinkerError),
        (Behaviour(records=1, end="SIGBUS"), BadCheckpointError),
    ],
)
def test_bad_checkpoint_is_tried_again_when_its_models_change_or_late(
    play: Play, behaviour: Behaviour, kind: type[LinkerError]
) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(behaviour)
        async with bench.running() as studies:
            await bench.until(lambda: failure(studies))
            found = failure(studies)
            assert found is not None
            assert isinstance(found.error, kind)
            assert studies.retry_in_s(studies.families()["base"]) == AT_ONCE.max_backoff_s
            bench.now += AT_ONCE.max_backoff_s - 0.5
            await bench.looks()
            assert len(bench.requests()) == 1
            bench.now += 0.5
            await bench.until(lambda: (f := failure(studies)) and f.times == 2)
            bench.tell(Behaviour())
            await bench.add("third")  # at once
            await bench.until(lambda: finished(studies))

    play(scenario)


def test_files_that_are_put_back_are_studied_without_a_change_of_models(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.folders.error = BadCheckpointError("far: its files were replaced.")
        async with bench.running() as studies:
            await bench.until(lambda: failure(studies))
            bench.folders.error = None
            await bench.looks()
            assert bench.requests() == []
            bench.now += AT_ONCE.max_backoff_s
            await bench.until(lambda: finished(studies))
            assert failure(studies) is None

    play(scenario)


@pytest.mark.parametrize(
    ("end", "kind"), [("nonsense", EngineFailureError), ("SIGKILL", InsufficientCapacityError)]
)
def test_worker_that_goes_wrong_is_ended_and_said(
    play: Play, end: Any, kind: type[LinkerError]
) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=1, end=end))
        async with bench.running() as studies:
            await bench.until(lambda: failure(studies))
            assert isinstance(error_of(studies), kind)
            assert not is_running(bench.requests()[0]["pid"])

    play(scenario)


def test_checkpoint_that_cannot_be_found_fails_the_study(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.folders.error = BadCheckpointError("far: its files were replaced.")
        async with bench.running() as studies:
            await bench.until(lambda: failure(studies))
            assert error_of(studies).message == "far: its files were replaced."
        assert bench.requests() == []

    play(scenario)


def test_fault_of_ours_ends_a_study_and_not_the_server(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.folders.error = AssertionError("ours")
        async with bench.running() as studies:
            await bench.until(lambda: failure(studies))
            assert isinstance(error_of(studies), EngineFailureError)
            assert "ours" not in error_of(studies).message
            bench.folders.error = None
            bench.now += AT_ONCE.backoff_s
            await bench.until(lambda: finished(studies))

    play(scenario)


@pytest.mark.usefixtures("impatient")
def test_registry_that_cannot_be_written_delays_a_study(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.registry._engine.connect() as blocker:
            blocker.exec_driver_sql("BEGIN IMMEDIATE")
            async with bench.running() as studies:
                await bench.until(lambda: failure(studies))
                assert isinstance(error_of(studies), NotReadyError)
                blocker.rollback()
                bench.now += AT_ONCE.backoff_s
                await bench.until(lambda: finished(studies))

    play(scenario)
