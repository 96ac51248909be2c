"""What becomes of studies whose models come, go and change."""

from __future__ import annotations

from dataclasses import replace

from tests.server.studies.bench import (
    Bench,
    Play,
    attempt,
    done_of,
    finished,
    is_running,
)
from tests.server.studies.fake_worker import TENSORS, Behaviour


def test_new_variant_makes_another_study_and_the_old_one_is_shown_until_then(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            old = finished(studies)
            bench.tell(Behaviour(records=1, end="wait"))
            await bench.add("third")
            await bench.until(lambda: (a := attempt(studies)) and a.done)
            assert finished(studies) == old
        bench.tell(Behaviour())
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies) not in (None, old))
            assert bench.requests()[1]["done"] == []  # deltas are of other models
            assert done_of(bench.requests()[2]) == [TENSORS[0]]
            await bench.until(lambda: len(bench.rows()) == 1)
            new = finished(studies)
            assert new is not None
            assert list(new.variants) == ["near", "far", "third"]

    play(scenario)


def test_deleted_variant_takes_the_study_with_it(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            old = finished(studies)
            assert old is not None
            bench.tell(Behaviour(records=0, end="wait"))
            await bench.roster.replace(delete=["third"])
            assert finished(studies) is None  # at once: nothing speaks of who is gone
            await bench.until(lambda: old.key not in bench.rows())
            assert bench.registry.study_tensors(old.key) == []
            bench.tell(Behaviour())

    play(scenario)


def test_family_that_is_gone_leaves_no_rows(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            await bench.roster.replace(delete=["near", "far", "base"])
            assert studies.finished() == {}
            await bench.until(lambda: not bench.rows())

    play(scenario)


def test_model_that_fails_to_load_leaves_the_study_in_peace(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            rows = bench.rows()
            far = bench.roster.model("far")
            await bench.roster.save(replace(far, fingerprint=None))  # it is being onboarded anew
            await bench.looks()
            assert finished(studies) is None
            assert bench.rows() == rows
            await bench.roster.save(far)
            assert finished(studies) is not None

    play(scenario)


def test_change_of_the_models_ends_a_worker_that_studies_others(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=1, end="wait"))
        async with bench.running() as studies:
            await bench.until(lambda: (a := attempt(studies)) and a.done)
            bench.tell(Behaviour())
            await bench.add("third")
            await bench.until(lambda: finished(studies))
        first, second = bench.requests()
        assert not is_running(first["pid"])
        assert second["done"] == []

    play(scenario)
