"""Variants whose checkpoints cannot be studied: the others are, and these when they change."""

from __future__ import annotations

import pytest

from linker_core.errors import BadCheckpointError
from server.studies.families import Family, Member
from server.studies.files import Places, UnfitError
from server.studies.left_out import LeftOut
from server.studies.studies import Studies
from tests.server.studies.bench import (
    AT_ONCE,
    Bench,
    Play,
    attempt,
    done_of,
    error_of,
    failure,
    finished,
)
from tests.server.studies.fake_worker import TENSORS, Behaviour

CUT = BadCheckpointError("third: its file was cut off.")
THIRD = Member(name="third", fingerprint="of third")


def left_out(studies: Studies) -> dict[str | None, str]:
    errors = studies.families()["base"].left_out
    return {member.name: error.message for member, error in errors.items()}


def studied(studies: Studies) -> list[str]:
    study = finished(studies)
    return [] if study is None else list(study.variants)


def test_others_are_studied_without_a_variant_that_cannot_be_found(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        bench.folders.unfit = {"third": CUT}
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            assert studied(studies) == ["near", "far"]
            assert left_out(studies) == {"third": CUT.message}
            assert failure(studies) is None
            await bench.looks()
        assert len(bench.requests()) == 1

    play(scenario)


@pytest.mark.parametrize("records", [0, 2])
def test_others_are_studied_without_a_variant_that_the_worker_names(
    play: Play, records: int
) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        bench.tell(Behaviour(records=records, end="error", variant="third"))
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            assert studied(studies) == ["near", "far"]
            assert left_out(studies) == {"third": "That is why."}
            await bench.until(lambda: len(bench.rows()) == 1)  # of the first nothing is kept
        first, second = bench.requests()
        assert list(first["variants"]) == ["near", "far", "third"]  # type: ignore[call-overload]
        assert second["done"] == []

    play(scenario)


def test_all_that_are_unfit_are_left_out_at_once(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        for name in ("third", "fourth"):
            await bench.add(name)
        bench.folders.unfit = {"third": CUT, "fourth": BadCheckpointError("fourth: gone.")}
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            assert left_out(studies) == {"third": CUT.message, "fourth": "fourth: gone."}
        assert len(bench.requests()) == 1

    play(scenario)


def test_study_of_before_is_shown_until_the_next_though_one_of_its_models_is_left_out(
    play: Play,
) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            bench.folders.unfit = {"third": CUT}
            bench.tell(Behaviour(records=0, end="wait"))
            await bench.add("fourth")
            await bench.until(lambda: attempt(studies) and left_out(studies))
            assert studied(studies) == ["near", "far", "third"]
        bench.tell(Behaviour())
        async with bench.running() as studies:
            await bench.until(lambda: studied(studies) == ["near", "far", "fourth"])
            await bench.until(lambda: len(bench.rows()) == 1)

    play(scenario)


def test_too_few_that_are_left_fail_until_files_change(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.folders.unfit = {"far": CUT}
        async with bench.running() as studies:
            await bench.until(lambda: left_out(studies))
            assert studies.families()["base"].key is None
            await bench.looks()
            bench.folders.unfit = {}
            bench.folders.stamps["far"] = 1
            await bench.until(lambda: finished(studies))
            assert left_out(studies) == {}
        assert len(bench.requests()) == 1

    play(scenario)


def test_variant_is_taken_in_again_when_its_files_have_changed(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        bench.folders.unfit = {"third": CUT}
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            bench.folders.unfit = {}
            bench.now += 100 * AT_ONCE.max_backoff_s
            await bench.looks()
            assert left_out(studies) == {"third": CUT.message}  # time alone mends nothing
            bench.folders.stamps["third"] = 1
            await bench.until(lambda: studied(studies) == ["near", "far", "third"])
            assert left_out(studies) == {}

    play(scenario)


def test_files_that_change_while_they_are_tried_are_tried_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        find = bench.folders.find

        async def find_late(family: Family) -> Places:
            if bench.folders.stamps:
                return await find(family)
            bench.folders.stamps["third"] = 1
            raise UnfitError({"third": CUT})

        monkeypatch.setattr(bench.folders, "find", find_late)
        async with bench.running() as studies:
            await bench.until(lambda: studied(studies) == ["near", "far", "third"])

    play(scenario)


def test_study_under_way_ends_before_a_variant_is_taken_in_again(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        bench.folders.unfit = {"third": CUT}
        bench.tell(Behaviour(records=2, end="wait"))
        async with bench.running() as studies:
            await bench.until(lambda: (a := attempt(studies)) and len(a.done) == 2)
            bench.folders.stamps["third"] = 1
            bench.folders.unfit = {}
            await bench.looks()
            running = attempt(studies)
            assert running is not None
            assert len(running.done) == 2
        assert len(bench.requests()) == 1

    play(scenario)


def test_model_that_is_deleted_or_has_other_weights_is_not_left_out_any_more(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        bench.folders.unfit = {"third": CUT}
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            await bench.roster.replace(delete=["third"])
            await bench.looks()
            bench.folders.unfit = {}
            await bench.add("third")
            await bench.until(lambda: studied(studies) == ["near", "far", "third"])

    play(scenario)


def test_bad_base_fails_the_study_whole(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        bench.folders.error = BadCheckpointError("base: its files were replaced.")
        async with bench.running() as studies:
            await bench.until(lambda: failure(studies))
            assert error_of(studies).message == "base: its files were replaced."
            assert left_out(studies) == {}

    play(scenario)


def test_server_that_starts_anew_finds_the_study_without_it(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        bench.folders.unfit = {"third": CUT}
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
        async with bench.running() as studies:
            await bench.until(lambda: left_out(studies))
            assert studied(studies) == ["near", "far"]
            await bench.looks()
        assert len(bench.requests()) == 1
        assert len(bench.registry.study_tensors(next(iter(bench.rows())))) == len(TENSORS)

    play(scenario)


def test_server_that_starts_anew_goes_on_without_it_where_the_last_was(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.add("third")
        bench.folders.unfit = {"third": CUT}
        bench.tell(Behaviour(records=2, end="wait"))
        async with bench.running() as studies:
            await bench.until(lambda: (a := attempt(studies)) and len(a.done) == 2)
        bench.tell(Behaviour())
        async with bench.running() as studies:
            await bench.until(lambda: finished(studies))
            assert studied(studies) == ["near", "far"]
            await bench.until(lambda: len(bench.rows()) == 1)
        assert done_of(bench.requests()[1]) == sorted(TENSORS[:2])

    play(scenario)


def test_of_studies_that_were_begun_and_left_only_the_last_is_kept(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.tell(Behaviour(records=1, end="wait"))
        async with bench.running() as studies:
            for name in ("third", "fourth", "fifth"):
                await bench.until(lambda: (a := attempt(studies)) and a.done)
                before = attempt(studies)
                await bench.add(name)
                await bench.until(lambda: (a := attempt(studies)) and a is not before)  # noqa: B023
            await bench.until(lambda: (a := attempt(studies)) and a.done)
            await bench.until(lambda: len(bench.rows()) == 2)
            kept = [list(study.variants) for study in bench.rows().values()]
        assert sorted(map(len, kept)) == [4, 5]

    play(scenario)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def stamp(value: int) -> tuple[tuple[str, int, int, int, int], ...]:
    return (("model.safetensors", value, 0, 0, 0),)


def test_files_that_still_change_are_left_alone() -> None:
    clock = Clock()
    left = LeftOut(settle_s=30.0, clock=clock)
    left.add(THIRD, CUT, stamp(0))
    for part in range(1, 5):
        clock.now += 29.0
        left.see(THIRD, stamp(part))
    assert left.errors == {THIRD: CUT}
    clock.now += 29.0
    left.see(THIRD, stamp(4))
    assert left.errors == {THIRD: CUT}
    clock.now += 1.0
    left.see(THIRD, stamp(4))
    assert left.errors == {}


def test_files_that_are_as_they_were_again_are_not_tried_again() -> None:
    clock = Clock()
    left = LeftOut(settle_s=30.0, clock=clock)
    left.add(THIRD, CUT, stamp(0))
    left.see(THIRD, stamp(1))
    left.see(THIRD, stamp(0))
    clock.now += 300.0
    left.see(THIRD, stamp(0))
    assert left.errors == {THIRD: CUT}
    left.keep(())
    assert left.errors == {}
