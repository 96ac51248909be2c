"""When a study begins, and what it gives way to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from server.studies.studies import Timing
from tests.server.studies.bench import (
    AT_ONCE,
    NOW,
    Bench,
    Play,
    attempt,
    done_of,
    failure,
    finished,
    is_running,
)
from tests.server.studies.fake_worker import TENSORS, Behaviour


def test_jobs_go_first(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=2, end="wait"))
        async with bench.running() as studies:
            await bench.until(lambda: (a := attempt(studies)) and len(a.done) == 2)
            job = await bench.begin_job()
            await bench.until(lambda: attempt(studies) is None)
            assert not is_running(bench.requests()[0]["pid"])
            assert failure(studies) is None
            bench.tell(Behaviour())
            await bench.looks()
            assert len(bench.requests()) == 1
            await bench.roster.save(replace(job, finished_at=2.0))
            await bench.until(lambda: finished(studies))
        assert done_of(bench.requests()[1]) == sorted(TENSORS[:2])

    play(scenario)


def test_study_waits_until_models_and_jobs_have_been_left_alone(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        timing = Timing(settle_s=30.0, look_s=0.01)
        async with bench.running(timing=timing) as studies:
            await bench.looks()
            bench.now = NOW + 29.0
            await bench.add("third")
            await bench.looks()
            bench.now = NOW + 58.0
            job = await bench.begin_job()
            await bench.looks()
            await bench.roster.save(replace(job, finished_at=2.0))
            bench.now = NOW + 87.0
            await bench.looks()
            assert bench.requests() == []
            bench.now = NOW + 88.0
            await bench.until(lambda: finished(studies))

    play(scenario)


def test_what_a_study_waits_for_is_said(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=0, end="wait"))
        timing = Timing(settle_s=30.0, look_s=0.01)
        async with bench.running(timing=timing) as studies:
            family = studies.families()["base"]
            assert "not read yet" in studies.waits_for(family)
            await bench.looks()
            bench.now = NOW + 10.5
            assert studies.waits_for(family).startswith("It begins in 20 s, if no job runs")
            job = await bench.begin_job()
            assert studies.waits_for(family) == "It begins once no job has run for 30 s."
            await bench.looks()
            await bench.roster.save(replace(job, finished_at=2.0))
            assert "in 30 s" in studies.waits_for(family)
            bench.now = NOW + 40.5
            await bench.until(lambda: attempt(studies))
            other = replace(family, label="other", key="another")
            assert studies.waits_for(other) == "It begins once the study of base has ended."

    play(scenario)


def test_study_that_has_failed_waits_for_jobs_as_others_do(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=0, end="exit"))
        timing = replace(AT_ONCE, settle_s=30.0)
        async with bench.running(timing=timing) as studies:
            await bench.looks()
            bench.now = NOW + 30.0
            await bench.until(lambda: failure(studies))
            bench.tell(Behaviour())
            job = await bench.begin_job()
            bench.now = NOW + 89.0
            await bench.looks()
            await bench.roster.save(replace(job, finished_at=2.0))
            bench.now = NOW + 118.0  # its turn came at 90
            await bench.looks()
            assert attempt(studies) is None
            bench.now = NOW + 119.0
            await bench.until(lambda: finished(studies))

    play(scenario)


def test_drain_ends_the_worker_and_begins_no_other(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=1, end="wait"))
        # Long between two looks: the drain itself wakes it.
        async with bench.running(timing=replace(AT_ONCE, look_s=600.0)) as studies:
            await bench.until(lambda: (a := attempt(studies)) and a.done)
            bench.closing.set()
            await bench.until(lambda: attempt(studies) is None)
            assert not is_running(bench.requests()[0]["pid"])
        assert len(bench.requests()) == 1
        [key] = bench.rows()
        assert set(bench.registry.study_tensors(key)) == {TENSORS[0]}

    play(scenario)


def test_nothing_is_studied_where_that_is_off(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.running(is_enabled=False) as studies:
            await bench.looks()
            assert attempt(studies) is None
        assert bench.requests() == []

    play(scenario)


def test_what_was_found_is_shown_though_studies_are_off(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
        async with bench.running(is_enabled=False) as studies:
            await bench.until(lambda: finished(studies))

    play(scenario)


def test_one_study_runs_at_a_time_and_each_has_its_turn(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        for position, name in enumerate(("other", "left", "right"), start=10):
            await bench.add(name)
            record = bench.roster.model(name)
            donor = None if name == "other" else "other"
            plan: dict[str, Any] = {
                "policy": "exact",
                "donor_fingerprint": donor and "of other",
                "rungs": {},
            }
            changed = replace(record, donor=donor, family="other", plan=plan, position=position)
            await bench.roster.save(changed)
        async with bench.running() as studies:
            await bench.until(lambda: len(studies.finished()) == 2)
        assert [len(bench.requests())] == [1]
        assert len(bench.rows()) == 2

    play(scenario)
