"""What comes back after a restart, and what happens to what cannot."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from linker_core.engine.messages import ModelLoaded
from linker_core.errors import EngineFailureError, InsufficientCapacityError
from server.bridge.client import EngineClient
from server.bridge.supervisor import EngineState
from server.onboarding.planner import Planner
from server.onboarding.returning import Returning, _key
from server.onboarding.roster import Roster
from server.registry.records import JobRecord, ModelRecord, ModelState, Record
from server.residency.catalog import ServedModel, TextSide
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import loads
from tests.tiny import make_checkpoint


@pytest.fixture
def state(tmp_path: Path, models: dict[str, Path]) -> Path:
    """The state of a server that served both models."""
    with live_server(tmp_path / "state", models=models, root=tmp_path) as server:
        server.until_ready()
    return tmp_path / "state"


def change(path: Path) -> bytes:
    """Changes one weight; returns the file as it was."""
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


def strike(server: LiveServer, name: str, times: int) -> Returning:
    """Counts deaths of the engine against a model."""
    returning = server.services.onboarder._restorer.returning
    server.until_ready()
    returning._strikes[_key(server.services.roster.model(name))] = times
    return returning


def lose_engine(server: LiveServer) -> None:
    """Kills the engine, and waits for the next."""
    first = server.services.engine.pid
    server.services.engine.kill()
    server.until(lambda: server.services.engine.pid not in (first, None))
    server.until_ready()


@pytest.mark.parametrize("plan", ['{"policy": "thresholds"}', "{", "[]", "3"])
def test_damaged_plan_fails_its_model_alone(state: Path, plan: str) -> None:
    with sqlite3.connect(state / "registry.sqlite3") as connection:
        connection.execute("UPDATE models SET plan = ? WHERE name = 'near'", (plan,))
    connection.close()
    with live_server(state) as server:
        server.until_ready()
        cards = {card["id"]: card for card in server.client.get("/models").json()["data"]}
        assert cards["base"]["state"] == "ready"
        assert cards["near"]["state"] == "failed"
        assert cards["near"]["error"]["code"] == "bad_checkpoint"
        assert server.client.get("/metrics").status_code == 200
        assert server.chat("base").status_code == 200


def test_fault_of_ours_fails_its_model_alone(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = Planner.fingerprint

    async def failing(planner: Planner, text: TextSide, donor: ServedModel | None) -> str:
        if text.path.name == "base":
            raise RuntimeError("a fault")
        return await fingerprint(planner, text, donor)

    monkeypatch.setattr(Planner, "fingerprint", failing)
    with live_server(state) as server:
        server.until(lambda: server.services.onboarder.startup_failures() == ["base", "near"])
        error = server.client.get("/models/base").json()["error"]
        assert (error["code"], "a fault" in error["message"]) == ("engine_failure", False)


def test_variant_of_a_missing_donor_comes_back_with_it(
    state: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    before = change(models["base"])
    with live_server(state, root=tmp_path) as server:
        server.until(lambda: server.services.onboarder.startup_failures() == ["base", "near"])
        card = server.client.get("/models/near").json()
        assert (card["state"], card["error"]["code"]) == ("unloaded", "not_ready")
        row = server.services.registry.model("near")
        assert row is not None
        assert row.state == "unloaded"
        (models["base"] / "model.safetensors").write_bytes(before)
        assert server.onboard("base", models["base"]).status_code == 201
        assert server.chat("near").status_code == 200
        card = server.client.get("/models/near").json()
        assert (card["state"], card["error"]) == ("ready", None)


def test_engine_that_stood_still_for_a_while_keeps_its_models(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    with live_server(tmp_path / "s", models=models, limits=replace(LIMITS, stall_s=0.2)) as server:
        server.until_ready()
        pid = server.services.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        server.until(lambda: server.services.engine.state is EngineState.STALLED)
        restorer = server.services.onboarder._restorer
        assert server.call(restorer.engine()) is server.services.engine.client
        os.kill(pid, signal.SIGCONT)
        server.until_ready()
        assert server.chat("near").status_code == 200
    assert loads(models["near"]) == ["near"]


def test_models_that_came_back_have_no_strikes(live: LiveServer) -> None:
    returning = strike(live, "near", 1)
    lose_engine(live)
    assert returning._strikes == {}


def test_strikes_are_not_those_of_another_model_of_the_name(
    live: LiveServer, models: dict[str, Path]
) -> None:
    returning = strike(live, "near", 2)
    assert live.client.delete("/models/near").status_code == 200
    assert live.onboard("near", models["near"]).status_code == 201
    lose_engine(live)
    assert live.client.get("/models/near").json()["state"] == "ready"
    assert returning._strikes == {}


def test_start_up_model_whose_files_changed_is_planned_anew_with_its_variants(
    state: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "newer", seed=9)
    shutil.copy(tmp_path / "newer" / "model.safetensors", models["base"])
    with live_server(state, models={"base": models["base"]}) as server:
        server.until(
            lambda: [server.chat(name).status_code for name in ("base", "near")] == [200, 200]
        )
        server.until_ready()
        base, near = (server.client.get(f"/models/{name}").json() for name in ("base", "near"))
        assert base["state"] == near["state"] == "ready"
        assert near["blocks"]["alias"] == 0  # against the new weights
    assert loads(models["base"]) == ["base", "base"]


def test_directory_that_became_a_link_is_not_followed(
    state: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    models["near"].rename(tmp_path / "outside")
    models["near"].symlink_to(tmp_path / "outside")
    with live_server(state, limits=LIMITS) as server:
        server.until_ready()
        card = server.client.get("/models/near").json()
        assert (card["state"], card["error"]["code"]) == ("failed", "bad_checkpoint")
        assert server.chat("base").status_code == 200


def test_what_finds_no_room_is_stored_before_anybody_else_can_bring_it_back(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, restorer = live.services, live.services.onboarder._restorer
    live.until(lambda: live.client.get("/models/near").json()["state"] == "ready")
    turns: list[bool] = []
    settled = services.roster.settle

    async def refuse(_name: str, *, may_evict: bool) -> None:
        raise InsufficientCapacityError(f"No room without evicting: {may_evict}.")

    async def settle(*records: ModelRecord | JobRecord, delete: Sequence[str] = ()) -> None:
        if any(isinstance(record, ModelRecord) for record in records):
            turns.append(services.catalog.turn("near").locked())
        await settled(*records, delete=delete)

    async def catch_up() -> None:
        await services.evictions.unload("near")
        restorer._left_out.add("near")
        await restorer.catch_up()

    monkeypatch.setattr(restorer.returning, "bring_back", refuse)
    monkeypatch.setattr(services.roster, "settle", settle)
    live.call(catch_up())
    assert turns == [True]
    monkeypatch.undo()
    assert live.chat("near").status_code == 200


def test_engine_that_ends_as_it_has_loaded_a_model_leaves_no_model_open(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.until(lambda: live.client.get("/models/near").json()["state"] == "ready")
    load = EngineClient.load

    async def last_words(client: EngineClient, *args: Any, **options: Any) -> ModelLoaded:
        monkeypatch.undo()  # the next engine lives
        loaded = await load(client, *args, **options)
        live.services.engine.kill()
        await client.closed.wait()
        for _ in range(5):  # until the supervisor has closed every model
            await asyncio.sleep(0)
        return loaded

    live.call(live.services.evictions.unload("near"))
    monkeypatch.setattr(EngineClient, "load", last_words)
    assert live.chat("near").status_code == 503
    live.until_ready()
    assert live.chat("near").status_code == 200


@pytest.mark.parametrize("held", ["near", "base"])
def test_what_somebody_else_brings_back_is_not_waited_for(live: LiveServer, held: str) -> None:
    services, restorer = live.services, live.services.onboarder._restorer
    live.until_ready()

    async def catch_up_meanwhile() -> None:
        for name in ("near", "base"):
            await services.evictions.unload(name)
        restorer._left_out.add("near")
        async with asyncio.timeout(20), services.catalog.turn(held):
            await restorer.catch_up()

    live.call(catch_up_meanwhile())
    assert services.catalog.get("near") is None
    live.call(restorer.catch_up())
    assert services.catalog.get("near") is not None


def test_donors_are_recalled_though_requests_wait_for_them(live: LiveServer) -> None:
    services, restorer = live.services, live.services.onboarder._restorer
    live.until_ready()

    async def recall_meanwhile() -> None:
        for name in ("near", "base"):
            await services.evictions.unload(name)
        services.catalog.retract("base")  # as after a restart
        async with asyncio.timeout(20), services.catalog.turn("base"):
            await restorer.returning.recall_donors()

    live.call(recall_meanwhile())
    assert services.catalog.dormant("base") is not None


def test_what_the_engine_dies_before_is_tried_again(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, restorer = live.services, live.services.onboarder._restorer
    live.until_ready()

    async def die(_name: str, *, may_evict: bool) -> None:
        client = services.engine.client
        services.engine.kill()
        await client.closed.wait()
        raise EngineFailureError(f"The engine died; evicting: {may_evict}.")

    async def catch_up() -> None:
        await services.evictions.unload("near")
        restorer._left_out.add("near")
        await restorer.catch_up()

    monkeypatch.setattr(restorer.returning, "bring_back", die)
    first = services.engine.pid
    live.call(catch_up())
    monkeypatch.undo()
    live.until(lambda: services.engine.pid not in (first, None))
    live.until_ready()
    assert services.catalog.get("near") is None
    live.call(restorer.catch_up())
    assert services.catalog.get("near") is not None


def test_start_is_over_once_its_models_are_stored(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, go_on = threading.Event(), threading.Event()
    save = Roster.save

    async def save_slowly(roster: Roster, *records: Record) -> None:
        if any(isinstance(r, ModelRecord) and r.state is ModelState.READY for r in records):
            resident.set()
            await asyncio.to_thread(go_on.wait, 60)
        await save(roster, *records)

    monkeypatch.setattr(Roster, "save", save_slowly)
    with live_server(tmp_path / "state", models={"base": models["base"]}) as server:
        assert resident.wait(60)
        assert server.services.catalog.get("base") is not None
        assert server.client.get("/ready").status_code == 503
        go_on.set()
        server.until_ready()
        assert server.client.post("/models/unload", json={"model": "base"}).status_code == 200
