"""Pool and registry under any order of operations and faults.

Whatever was onboarded, evicted, deleted, rehomed, cancelled, failed or restarted: the bytes are
those of the storages, the budget holds, rows and engine agree, and every model answers as it did
on its first day.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.onboarding.twin_rows import twin_name
from server.registry.records import ModelRecord, ModelState
from tests.server.crash.soundness import check_files, check_rows
from tests.server.in_process import Server, real_processes_after
from tests.server.world import BASE, NAMES, STRANGER, World, ask, onboard, said

BUSY = (429, 503, 507)  # said of a lack of room or of readiness
_Result = TypeVar("_Result")


class Machine(RuleBasedStateMachine):
    """Operators and clients of one server."""

    world: World
    budget_bytes: int

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._folder = Path(tempfile.mkdtemp())
        self._lives = 0
        self._server: Server | None = None

    def teardown(self) -> None:
        try:
            if self._server is not None:
                self.run(self._server.stop())
        finally:
            self._runner.close()
            shutil.rmtree(self._folder)

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs a coroutine in the server's loop."""
        return self._runner.run(work)

    @property
    def server(self) -> Server:
        assert self._server is not None
        return self._server

    @property
    def state(self) -> Path:
        return self._folder / f"state-{self._lives}"

    def rows(self) -> dict[str, ModelRecord]:
        return {record.name: record for record in self.server.services.roster.models()}

    def twins(self) -> dict[str, ModelRecord | None]:
        """Returns the resident unshared copies, each with the row of its model."""
        models = [model.name for model in self.server.services.catalog.models()]
        owners = {twin_name(name): row for name, row in self.rows().items()}
        return {name: owners.get(name) for name in models if name not in self.rows()}

    def head(self) -> str | None:
        """Returns the donor of the family of `base`."""
        rows = self.rows()
        known = [row for name, row in rows.items() if name != STRANGER and row.donor is None]
        heads = [row.name for row in known if row.state is not ModelState.FAILED]
        assert len(heads) < 2, heads
        return heads[0] if heads else None

    # --- operations ---------------------------------------------------------------------------

    @initialize(rehomed=st.booleans())
    def begin(self, rehomed: bool) -> None:
        """Begins with a donor, or with a family that its donor has left behind."""
        self._server = self.run(Server.start(self.world.settings(self.state, self.budget_bytes)))
        self.onboard(BASE)
        if rehomed:
            self.onboard("aliased")
            self.onboard("wide")
            self.delete(BASE, rehome=True)

    @rule(name=st.sampled_from(NAMES))
    def onboard(self, name: str) -> None:
        donor = self._donor_for(name)
        if donor is None:
            return
        response = self.run(onboard(self.server, name, donor, self.world.root))
        assert response.status_code in (201, 409, *BUSY), response.text

    @rule(name=st.sampled_from(NAMES), after=st.integers(0, 40))
    def onboard_and_cancel(self, name: str, after: int) -> None:
        donor = self._donor_for(name)
        if donor is None or name in self.rows():
            return
        self.run(self._onboard_and_cancel(name, donor, after))

    @rule(name=st.sampled_from(NAMES))
    def request(self, name: str) -> None:
        row = self.rows().get(name)
        response = self.run(ask(self.server, name))
        if row is None:
            assert response.status_code == 404, response.text
        elif row.state is ModelState.FAILED:
            assert response.status_code == 503, response.text
        else:
            assert response.status_code in (200, *BUSY), response.text
            if response.status_code == 200:
                assert said(response) == self.world.answers[name], name

    @rule(name=st.sampled_from(NAMES))
    def request_unshared(self, name: str) -> None:
        row = self.rows().get(name)
        response = self.run(ask(self.server, name, "unshared"))
        if row is None:
            assert response.status_code == 404, response.text
        elif row.state is ModelState.FAILED:
            assert response.status_code == 503, response.text
        elif name not in self.world.own_answers:
            assert response.status_code == 400, response.text
        else:
            assert response.status_code in (200, *BUSY), response.text
            if response.status_code == 200:
                assert response.json()["model"] == name
                assert said(response) == self.world.own_answers[name], name

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=6))
    def crowd(self, names: list[str]) -> None:
        known = [name for name in names if name in self.rows()]
        for name, response in zip(known, self.run(self._ask_all(known)), strict=True):
            assert response.status_code in (200, *BUSY), response.text
            if response.status_code == 200:
                assert said(response) == self.world.answers[name], name

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        row = self.rows().get(name)
        resident = self.server.services.catalog.get(name) is not None
        # Twins leave with their models, and for their donor.
        leaning = set(self.server.services.catalog.dependants(name)) - set(self.twins())
        leaving = {name, *(twin for twin, row in self.twins().items() if name in _pair(row))}
        snapshot, free = self.server.services.engine.snapshot, self._free_bytes()
        response = self.run(self.server.post("/models/unload", {"model": name}))
        if row is None:
            assert response.status_code == 404, response.text
        elif resident and leaning:
            assert response.status_code == 409, response.text
        elif row.state is not ModelState.FAILED:
            assert response.status_code == 200, response.text
        if resident and not leaning:
            assert row is not None
            assert snapshot is not None
            self.run(self._at_rest())
            freed = self._free_bytes() - free
            unique = sum(snapshot.models[one].unique for one in leaving)
            if row.donor is not None:
                assert freed == unique
            else:
                assert freed > unique  # the family's KV cache, too

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        before = self.rows().get(name)
        response = self.run(self.server.client.patch(f"/models/{name}", json={"pin": pinned}))
        if before is None:
            assert response.status_code == 404, response.text
            return
        refused = pinned and before.state is ModelState.FAILED
        assert response.status_code == (409 if refused else 200), response.text
        assert self.rows()[name].pinned == (before.pinned if refused else pinned)

    @rule(name=st.sampled_from(NAMES), alias=st.sampled_from(["one", "two"]))
    def alias(self, name: str, alias: str) -> None:
        response = self.run(self.server.client.patch(f"/models/{name}", json={"alias": alias}))
        if name not in self.rows():
            assert response.status_code == 404, response.text
            return
        taken = [row.name for row in self.rows().values() if row.alias == alias]
        assert len(taken) == 1
        assert response.status_code == (200 if taken == [name] else 409), response.text
        row = self.rows()[taken[0]]
        asked = self.run(ask(self.server, alias))
        if row.state is not ModelState.FAILED and asked.status_code == 200:
            assert said(asked) == self.world.answers[row.name]

    @rule(name=st.sampled_from(NAMES), rehome=st.booleans())
    def delete(self, name: str, rehome: bool) -> None:
        before = self.rows()
        leaning = [row.name for row in before.values() if row.donor == name]
        response = self.run(self.server.client.delete(f"/models/{name}", params={"rehome": rehome}))
        if name not in before:
            assert response.status_code == 404, response.text
        elif leaning and not rehome:
            assert response.status_code == 409, response.text
            assert leaning[0] in response.text
        else:
            assert response.status_code in (200, 409), response.text
        gone = name in before and response.status_code == 200
        assert (name in self.rows()) == (name in before and not gone)
        if gone and leaning:
            assert self.head() in leaning

    @rule(name=st.sampled_from(NAMES))
    def hand_over(self, name: str) -> None:
        body = {"model": name, "rehome": True}
        response = self.run(self.server.post("/models/unload", body))
        assert response.status_code in (200, 404, 409, *BUSY), response.text

    @rule(after=st.integers(0, 6), name=st.sampled_from(NAMES))
    def fail_load(self, after: int, name: str) -> None:
        """The device runs out of memory in the middle of what comes next."""
        self.server.faults.load_after = after
        if name in self.rows():
            response = self.run(ask(self.server, name))
            assert response.status_code in (200, *BUSY), response.text
        else:
            self.onboard(name)
        self.server.faults.load_after = None

    @rule(kind=st.sampled_from(["scan", "encode", "tune"]), name=st.sampled_from(NAMES))
    def fail_worker(self, kind: str, name: str) -> None:
        self.server.faults.worker = kind
        if name not in self.rows() and (donor := self._donor_for(name)) is not None:
            response = self.run(onboard(self.server, name, donor, self.world.root))
            assert response.status_code in (201, *BUSY), response.text
        self.server.faults.worker = None

    @rule()
    def kill_engine(self) -> None:
        self.run(self._kill_engine())

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        before = self.rows()
        old = self.state
        if killed:
            self._lives += 1
            self.run(self.server.crash(self.state))
        else:
            self.run(self.server.stop())
        self._server = None
        check_files(old, check_rows(old))
        self._server = self.run(Server.start(self.world.settings(self.state, self.budget_bytes)))
        self.run(self._at_rest())
        after = self.rows()
        assert set(after) == set(before)
        for name, row in after.items():
            was = before[name]
            assert (row.donor, row.plan, row.pinned, row.alias) == (
                was.donor, was.plan, was.pinned, was.alias
            ), name  # fmt: skip
            assert (row.state is ModelState.FAILED) == (was.state is ModelState.FAILED), name

    # --- what holds always --------------------------------------------------------------------

    @precondition(lambda self: self._server is not None)
    @invariant()
    def all_is_well(self) -> None:
        self.run(self._at_rest())
        server, rows = self.server, self.rows()
        server.check_engines()
        services, residents = server.services, server.engine.residents
        ready = {name for name, row in rows.items() if row.state is ModelState.READY}
        resident = {model.name for model in services.catalog.models()}
        assert resident == set(residents.served), (resident, residents.served)
        assert resident - set(self.twins()) == ready, (resident, ready)
        assert all(services.catalog.num_leases(name) == 0 for name in (*rows, *resident))
        self._check_twins()
        self._check_bytes()
        self.run(services.onboarder.flush_once())
        stored = {record.name: record for record in services.registry.models()}
        for name, row in self.rows().items():
            assert asdict(stored.pop(name)) == asdict(row)
        assert not stored
        check_files(self.state, check_rows(self.state))
        for name, response in zip(ready, self.run(self._ask_all(list(ready))), strict=True):
            assert response.status_code == 200, response.text
            assert said(response) == self.world.answers[name], name

    def _check_twins(self) -> None:
        """Every one has its model, and nobody sees one."""
        assert all(row is not None for row in self.twins().values()), self.twins()
        for path in ("/models", "/v1/models", "/metrics"):
            seen = self.run(self.server.client.get(path))
            assert seen.status_code == 200, seen.text
            assert "(unshared)" not in seen.text, path

    def _check_bytes(self) -> None:
        snapshot = self.server.services.engine.snapshot
        if snapshot is None:  # nothing has happened in this engine's life
            assert not self.server.engine.residents.served
            return
        weights, kv_bytes = snapshot.device_weight_bytes, snapshot.device_kv_bytes
        assert snapshot.reserved_bytes == snapshot.leaving_bytes == 0
        assert weights == self.server.engine.storage_bytes()
        assert weights + kv_bytes + snapshot.device_free_bytes == self.budget_bytes
        assert sum(model.unique for model in snapshot.models.values()) == weights

    # --- how ----------------------------------------------------------------------------------

    def _donor_for(self, name: str) -> str | None:
        """Returns what a model names as its donor; None where it would found another family."""
        head = self.head()
        if name == STRANGER:
            return "auto"
        if head is None:
            return "auto" if name == BASE else None
        return head if head != name else "auto"

    async def _onboard_and_cancel(self, name: str, donor: str, after: int) -> None:
        response = await onboard(self.server, name, donor, self.world.root, wait=False)
        if response.status_code != 202:
            assert response.status_code in BUSY, response.text
            return
        for _ in range(after):
            await asyncio.sleep(0.002)
        job = response.json()["id"]
        cancelled = await self.server.post(f"/models/jobs/{job}/cancel", {})
        assert cancelled.status_code in (200, 409), cancelled.text
        await self._at_rest()
        status = (await self.server.client.get(f"/models/jobs/{job}")).json()["status"]
        if cancelled.status_code == 200:
            assert status == "cancelled"
            assert name not in self.rows()
        else:
            assert status in ("succeeded", "failed")

    async def _ask_all(self, names: list[str]) -> list[httpx.Response]:
        return await asyncio.gather(*(ask(self.server, name) for name in names))

    async def _kill_engine(self) -> None:
        services = self.server.services
        old = services.engine.client
        services.engine.kill()
        await old.closed.wait()

    async def _at_rest(self) -> None:
        """Waits until nothing is on its way anywhere."""
        services = self.server.services
        await services.onboarder._restorer.done.wait()
        async with asyncio.timeout(30):
            while not await self._is_at_rest():
                await asyncio.sleep(0.005)

    async def _is_at_rest(self) -> bool:
        services = self.server.services
        self.server.check_engines()
        await services.evictions.settled()
        jobs = await services.roster.jobs()
        snapshot = services.engine.snapshot
        if any(job.finished_at is None for job in jobs):
            return False
        engine = self.server.engine
        if snapshot is None:
            return not engine.has_work and not services.catalog.models()
        idle = not engine.has_work and not snapshot.reserved_bytes and not snapshot.leaving_bytes
        known = set(snapshot.models) == set(engine.residents.served)
        same = {model.name for model in services.catalog.models()} == set(snapshot.models)
        return idle and known and same

    def _free_bytes(self) -> int:
        snapshot = self.server.services.engine.snapshot
        return self.budget_bytes if snapshot is None else snapshot.device_free_bytes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with real_processes_after():
        made = World(tmp_path_factory.mktemp("world"))
        asyncio.run(made.learn(tmp_path_factory.mktemp("learning") / "state"))
        yield made


def test_any_order_of_operations_and_faults_leaves_all_well(world: World) -> None:
    check(world, examples=10, steps=20)


@pytest.mark.parametrize("killed", [False, True])
def test_family_without_its_donor_comes_back_and_leaves_nothing(
    world: World, *, killed: bool
) -> None:
    machine = limited(world)()
    try:
        machine.begin(rehomed=True)
        for left in (2, 1):
            machine.all_is_well()
            machine.restart(killed)
            machine.all_is_well()
            assert len(machine.rows()) == left
            machine.delete(machine.head(), rehome=True)
        machine.all_is_well()
        assert not machine.rows()
    finally:
        machine.teardown()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_orders_of_operations_and_faults_leave_all_well(world: World) -> None:
    check(world, examples=200, steps=50)


def _pair(row: ModelRecord | None) -> tuple[str | None, ...]:
    """Returns a model and its donor."""
    return () if row is None else (row.name, row.donor)


def limited(world: World) -> type[Machine]:
    """Returns the machine with room for two families' caches and about half of the weights."""
    weights = sum(world.unique_bytes.values())
    kv_bytes = 2 * 512 * 2 * 2 * 12 * 4  # layers, tokens, keys and values, heads, width, float32

    class Limited(Machine):
        budget_bytes = 2 * kv_bytes + weights * 6 // 10

    Limited.world = world
    return Limited


def check(world: World, *, examples: int, steps: int) -> None:
    """Runs the machine."""
    run_state_machine_as_test(
        limited(world),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            phases=[Phase.generate],  # shrinking would take minutes of restarts
        ),
    )
