"""Models by the requests that need them: who waits, how long, and for what."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

import pytest

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
)
from server.metrics.evictions import EvictionReason
from server.registry.records import JobStage, ModelRecord, ModelState
from server.residency.on_demand import OnDemand, not_servable
from server.residency.rows import Outlook
from tests.server.residency.fakes import Device, in_loop, settle

SIZE = 100


class Loader:
    """Loads models when it is told to go on, or fails."""

    def __init__(self, on: Device) -> None:
        self.on = on
        self.begun: list[str] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.error: LinkerError | None = None
        self.seconds = 0.0

    async def bring_back(self, name: str) -> None:
        assert self.on.catalog.turn(name).locked()
        donor = self.on.rows.named(name).donor
        if donor is not None:
            async with self.on.catalog.turn(donor):
                if self.on.catalog.get(donor) is None:
                    await self.bring_back(donor)
        self.begun.append(name)

        async def load() -> None:
            await self.go_on.wait()
            self.on.now += self.seconds
            if self.error is not None:
                raise self.error
            if self.on.client.closed.is_set():
                raise EngineFailureError("The engine is gone.")
            self.on.load(name, SIZE, donor=donor)

        await self.on.room.fit(SIZE, load, what=name, keep=frozenset({name, "base"}))
        self.on.rows.amend(name, state=ModelState.READY)


class FakeEngines:
    """An engine that holds what it is to hold, or not yet."""

    def __init__(self) -> None:
        self.settled = asyncio.Event()
        self.settled.set()

    @property
    def is_restored(self) -> bool:
        return self.settled.is_set()

    async def engine(self) -> object:
        return await self.settled.wait()


class Scene:
    """A donor, unloaded variants `a` to `d`, and room for two of them."""

    def __init__(self, *, max_waiting: int = 8, timeout_s: float = 30) -> None:
        self.on = Device(350)
        self.on.put("base", 100, pinned=True)
        for name in "abcd":
            plan = {"unique_bytes": 2 << 20}
            self.on.know(name, donor="base", plan=plan, alias=f"alias-{name}")
        self.loader = Loader(self.on)
        self.engines = FakeEngines()
        self.on_demand = OnDemand(
            catalog=self.on.catalog,
            rows=self.on.rows,
            bring_back=self.loader.bring_back,
            close_one=self.on.room.close_one,
            engines=self.engines,
            max_waiting=max_waiting,
            timeout_s=timeout_s,
            clock=lambda: self.on.now,
        )
        self.served: list[str] = []

    async def ask(self, name: str, *, until: asyncio.Event | None = None) -> None:
        """Uses a model, until somebody says so."""
        async with self.on_demand.acquire(name) as model:
            assert self.on.catalog.num_leases(model.name)
            assert model.name in self.on.client.held
            self.served.append(model.name)
            if until is not None:
                await until.wait()
            assert model.name in self.on.client.held

    def asking(self, *names: str, until: asyncio.Event | None = None) -> list[asyncio.Task[None]]:
        return [asyncio.ensure_future(self.ask(name, until=until)) for name in names]


async def gathered(tasks: list[asyncio.Task[None]]) -> list[BaseException | None]:
    return await asyncio.gather(*tasks, return_exceptions=True)


@in_loop
async def test_a_resident_model_is_there_at_once_by_name_and_by_alias() -> None:
    scene = Scene()
    await scene.ask("a")
    await scene.ask("a")
    await scene.ask("alias-a")
    assert scene.loader.begun == ["a"]
    assert scene.served == ["a", "a", "a"]
    assert not scene.on.catalog.num_leases("a")


@in_loop
async def test_an_unknown_model_is_unknown() -> None:
    with pytest.raises(ModelNotFoundError):
        await Scene().ask("nobody")


@in_loop
async def test_however_many_wait_the_model_is_loaded_once() -> None:
    scene = Scene()
    scene.loader.go_on.clear()
    tasks = scene.asking("a", "alias-a", "a", "a")
    await settle()
    assert scene.served == []
    scene.loader.go_on.set()
    assert await gathered(tasks) == [None] * 4
    assert scene.loader.begun == ["a"]


@in_loop
async def test_a_client_that_leaves_takes_nothing_from_the_others() -> None:
    scene = Scene()
    scene.loader.go_on.clear()
    leaving, staying = scene.asking("a", "a")
    await settle()
    leaving.cancel()
    await settle()
    scene.loader.go_on.set()
    await staying
    assert scene.loader.begun == ["a"]


@in_loop
async def test_if_all_leave_the_load_goes_on() -> None:
    scene = Scene()
    scene.loader.go_on.clear()
    tasks = scene.asking("a", "a")
    await settle()
    for task in tasks:
        task.cancel()
    await settle()
    scene.loader.go_on.set()
    await settle()
    assert scene.on.catalog.get("a") is not None
    assert not scene.on.catalog.turn("a").wanted
    assert scene.loader.begun == ["a"]


@in_loop
async def test_begin_loads_without_waiting() -> None:
    scene = Scene()
    scene.on_demand.begin("alias-a")
    scene.on_demand.begin("a")
    await settle()
    assert scene.on.catalog.get("a") is not None
    scene.on_demand.begin("a")
    assert scene.loader.begun == ["a"]


@in_loop
async def test_too_many_who_wait_are_refused_and_resident_models_are_not() -> None:
    scene = Scene(max_waiting=2)
    await scene.ask("a")
    scene.loader.go_on.clear()
    waiting = scene.asking("b", "b")
    await settle()
    with pytest.raises(QueueFullError):
        await scene.ask("b")
    await scene.ask("a")
    scene.loader.go_on.set()
    assert await gathered(waiting) == [None, None]
    await scene.ask("b")


@in_loop
async def test_who_has_waited_too_long_is_told_so_and_the_load_goes_on() -> None:
    scene = Scene(timeout_s=0.01)
    scene.loader.go_on.clear()
    with pytest.raises(NotReadyError, match="longer than"):
        await scene.ask("a")
    scene.loader.go_on.set()
    await settle()
    assert scene.on.catalog.get("a") is not None


@in_loop
async def test_what_is_known_to_take_too_long_is_refused_at_once_with_when_to_come_back() -> None:
    scene = Scene(timeout_s=10)
    scene.loader.seconds = 25
    await scene.ask("a")
    scene.loader.seconds = 0
    with pytest.raises(NotReadyError) as refusal:
        await scene.ask("b")
    assert refusal.value.retry_after_s == 25
    await settle()
    await scene.ask("b")  # it was loaded all the same
    assert scene.loader.begun == ["a", "b"]


@in_loop
async def test_why_a_load_failed_is_told_to_all_and_the_next_request_tries_again() -> None:
    scene = Scene()
    scene.loader.error = EngineFailureError("The engine died.")
    ends = await gathered(scene.asking("a", "a"))
    assert [type(end) for end in ends] == [EngineFailureError, EngineFailureError]
    assert scene.loader.begun == ["a"]
    scene.loader.error = None
    await scene.ask("a")


@in_loop
async def test_damaged_files_are_not_the_requests_fault() -> None:
    scene = Scene()
    scene.loader.error = BadCheckpointError("The files are damaged.")
    with pytest.raises(NotReadyError, match="damaged"):
        await scene.ask("a")


@in_loop
async def test_what_does_not_fit_is_said_to_the_request() -> None:
    scene = Scene()
    for name in ("a", "b"):
        await scene.ask(name)
        scene.on.rows.amend(name, pinned=True)
    with pytest.raises(InsufficientCapacityError, match="100 bytes"):
        await scene.ask("c")


@in_loop
async def test_idle_models_leave_for_one_that_is_asked_for() -> None:
    scene = Scene()
    for name in ("a", "b", "c"):
        await scene.ask(name)
        scene.on.now += 1
    assert scene.on.client.unloaded == ["a"]
    assert scene.on.evicted(EvictionReason.CAPACITY) == 1
    await scene.ask("a")
    assert scene.on.client.unloaded == ["a", "b"]


@in_loop
async def test_a_model_waits_for_the_room_that_running_requests_hold() -> None:
    scene, ended = Scene(), asyncio.Event()
    running = scene.asking("a", "b", until=ended)
    await settle()
    waiting = scene.asking("c")
    await settle()
    assert scene.served == ["a", "b"]
    ended.set()
    assert await gathered([*running, *waiting]) == [None] * 3


@in_loop
async def test_a_model_waits_for_the_room_that_a_tuner_holds() -> None:
    scene = Scene()
    await scene.ask("a")
    scene.on.rows.amend("a", pinned=True)
    async with scene.on.room.reserving(scene.on.engine(), "tuner", 100, what="Measuring"):
        waiting = scene.asking("b")
        await settle()
        assert scene.served == ["a"]
    await gathered(waiting)
    assert scene.served == ["a", "b"]


@in_loop
async def test_a_tuner_that_does_not_end_is_503_not_a_final_507() -> None:
    scene = Scene(timeout_s=0.01)
    scene.on.rows.amend("base", pinned=True)
    async with scene.on.room.reserving(scene.on.engine(), "tuner", 150, what="Measuring"):
        with pytest.raises(NotReadyError, match="longer than"):
            await scene.ask("b")
        scene.loader.begun.clear()
        scene.on.catalog.note_change()
        await settle()
        assert not scene.on.catalog.turn("b").wanted  # nobody waits: it is given up


@in_loop
async def test_a_variant_and_its_donor_that_wait_for_room_do_not_wait_for_each_other() -> None:
    scene = Scene()
    await scene.on.evictions.unload("base")
    async with scene.on.room.reserving(scene.on.engine(), "tuner", 250, what="Measuring"):
        variant = scene.asking("a")
        await settle()
        assert not scene.on.catalog.turn("base").wanted  # the variant waits for room, not for it
        donor = scene.asking("base")
        await settle()
        assert scene.on.catalog.turn("base").wanted
    assert await gathered([*variant, *donor]) == [None, None]
    assert sorted(scene.served) == ["a", "base"]


@in_loop
async def test_requests_that_never_cease_keep_no_room_for_ever() -> None:
    scene = Scene()
    await scene.ask("d")
    scene.on.rows.amend("d", pinned=True)  # room for one more
    done = asyncio.Event()

    async def insist(name: str) -> None:
        """Two overlapping requests at any time."""
        while not done.is_set():
            async with scene.on_demand.acquire(name):
                scene.on.now += 0.01
                await asyncio.sleep(0)

    insisting = [asyncio.ensure_future(insist("a")) for _ in range(2)]
    await settle()
    assert scene.on.catalog.num_leases("a")
    await scene.ask("b")
    await scene.ask("c")
    done.set()
    await gathered(insisting)
    assert scene.on.catalog.dormant("b") is not None


@in_loop
async def test_two_that_compete_for_the_same_room_both_answer() -> None:
    scene = Scene()
    await scene.ask("d")
    scene.on.rows.amend("d", pinned=True)  # room for one more
    ends = [asyncio.Event() for _ in range(3)]
    tasks = [
        asyncio.ensure_future(scene.ask(name, until=end))
        for name, end in zip("abc", ends, strict=True)
    ]
    await settle()
    assert scene.served == ["d", "a"]
    for end in ends:
        end.set()
    assert await gathered(tasks) == [None] * 3
    assert sorted(scene.served) == ["a", "b", "c", "d"]


@in_loop
async def test_nobody_evicts_a_model_between_its_load_and_those_who_wait_for_it() -> None:
    scene = Scene()
    await scene.ask("d")
    scene.on.rows.amend("d", pinned=True)
    scene.loader.go_on.clear()
    tasks = scene.asking(*"aaabbb")
    await settle()
    scene.loader.go_on.set()
    assert await gathered(tasks) == [None] * 6
    assert scene.served[1:] == [*"aaabbb"]
    assert scene.on.client.unloaded == ["a"]


@in_loop
async def test_a_model_that_is_leaving_comes_back_once_it_has_left() -> None:
    scene = Scene()
    await scene.ask("a")
    scene.on.client.go_on.clear()
    leaving = asyncio.ensure_future(scene.on.evictions.evict_idle("a", EvictionReason.IDLE))
    await settle()
    assert scene.on.state("a") is ModelState.READY
    waiting = scene.asking("a")
    await settle()
    scene.on.client.go_on.set()
    await leaving
    assert await gathered(waiting) == [None]
    assert scene.loader.begun == ["a", "a"]


@in_loop
async def test_a_leased_model_stays_until_its_last_user_has_gone() -> None:
    scene, ended = Scene(), asyncio.Event()
    running = scene.asking("a", until=ended)
    await settle()
    unloading = asyncio.ensure_future(scene.on.evictions.unload("a"))
    await settle()
    later = scene.asking("a")  # waits, and brings it back
    await settle()
    assert scene.on.client.unloaded == []
    ended.set()
    await unloading
    assert await gathered([*running, *later]) == [None, None]
    assert scene.on.client.unloaded == ["a"]
    assert scene.on.catalog.get("a") is not None


@in_loop
async def test_a_model_deleted_while_it_is_waited_for_is_gone() -> None:
    scene = Scene()
    async with scene.on.catalog.turn("a"):
        waiting = scene.asking("a", "a")
        await settle()
        del scene.on.rows.records["a"]
    ends = await gathered(waiting)
    assert [type(end) for end in ends] == [ModelNotFoundError, ModelNotFoundError]
    assert scene.loader.begun == []


@in_loop
async def test_the_engines_death_during_a_load_ends_the_wait() -> None:
    scene = Scene()
    scene.loader.go_on.clear()
    waiting = scene.asking("a", "a")
    await settle()
    scene.on.client.die()
    scene.loader.go_on.set()
    ends = await gathered(waiting)
    assert [type(end) for end in ends] == [EngineFailureError, EngineFailureError]
    assert scene.on.state("a") is ModelState.UNLOADED
    assert not scene.on.catalog.turn("a").wanted


@in_loop
async def test_a_model_lost_with_the_engine_before_its_user_has_it_is_not_ready() -> None:
    scene = Scene()
    scene.loader.go_on.clear()
    waiting = scene.asking("a")
    await settle()
    scene.loader.go_on.set()
    while scene.on.catalog.get("a") is None:
        await asyncio.sleep(0)
    scene.on.catalog.clear()
    assert [type(end) for end in await gathered(waiting)] == [NotReadyError]


@in_loop
async def test_requests_wait_for_what_a_new_engine_is_to_hold_first() -> None:
    scene = Scene()
    scene.engines.settled.clear()
    waiting = scene.asking("a")
    await settle()
    assert scene.loader.begun == []
    scene.engines.settled.set()
    assert await gathered(waiting) == [None]


@in_loop
async def test_what_does_not_serve_is_refused_by_its_state() -> None:
    scene = Scene()
    scene.engines.settled.clear()
    for state in (ModelState.FAILED, ModelState.ONBOARDING, ModelState.READY):
        scene.on.rows.amend("a", state=state)
        with pytest.raises(NotReadyError):
            await scene.ask("a")
        with pytest.raises(NotReadyError):
            scene.on_demand.begin("a")
    assert scene.loader.begun == []


@in_loop
async def test_a_ready_model_that_a_restored_engine_does_not_have_is_loaded() -> None:
    scene = Scene()
    for name in ("a", "b"):  # stored as ready after the engine that had it was gone
        scene.on.rows.amend(name, state=ModelState.READY)
    await scene.ask("a")
    scene.on_demand.begin("b")
    await settle()
    assert scene.served == ["a"]
    assert scene.loader.begun == ["a", "b"]


def test_a_load_that_nobody_waits_for_and_that_finds_no_room_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @in_loop
    async def begin() -> None:
        scene, ended = Scene(), asyncio.Event()
        running = scene.asking("a", "b", until=ended)
        await settle()
        scene.on_demand.begin("c")
        await settle()
        ended.set()
        await gathered(running)

    with caplog.at_level(logging.WARNING, logger="server.residency.on_demand"):
        begin()
    (line,) = caplog.messages
    assert line.startswith("model c was not loaded: c needs 100 bytes")


@in_loop
async def test_a_fault_of_ours_ends_the_wait_too() -> None:
    scene = Scene()
    scene.on_demand._bring_back = _broken
    with pytest.raises(EngineFailureError):
        await scene.ask("a")
    assert not scene.on.catalog.turn("a").wanted


@in_loop
async def test_stop_breaks_off_what_is_on_its_way() -> None:
    scene = Scene()
    scene.loader.go_on.clear()
    waiting = scene.asking("a")
    await settle()
    await scene.on_demand.stop()
    assert [type(end) for end in await gathered(waiting)] == [NotReadyError]
    assert not scene.on.catalog.turn("a").wanted


@in_loop
async def test_a_lease_entered_in_one_task_may_end_in_another() -> None:
    scene = Scene()
    stack = AsyncExitStack()
    await asyncio.ensure_future(stack.enter_async_context(scene.on_demand.acquire("a")))
    assert scene.on.catalog.num_leases("a") == 1
    await stack.aclose()
    assert scene.on.catalog.num_leases("a") == 0


async def _broken(_name: str) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("stage", "remaining_s", "said"),
    [
        (None, None, "job-1 waits for its turn."),
        (JobStage.SCANNING, None, "job-1 is scanning."),
        (JobStage.SCANNING, 0.0, "job-1 is scanning."),
        (JobStage.TUNING, 94.2, "job-1 is tuning, for about 95 s more."),
    ],
)
def test_model_that_is_onboarded_says_how_far_its_job_is_and_when_to_ask_again(
    stage: JobStage | None, remaining_s: float | None, said: str
) -> None:
    record = ModelRecord(
        name="chat", source="", request={}, state=ModelState.ONBOARDING, position=0, created_at=0.0
    )
    outlook = Outlook(job_id="job-1", stage=stage, remaining_s=remaining_s)
    refusal = not_servable(record, outlook)
    assert refusal.message == (
        f"The model 'chat' is being onboarded, so it cannot answer now: {said}"
    )
    assert refusal.retry_after_s == (remaining_s or None)
