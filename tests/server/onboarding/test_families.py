"""Donors that leave their families, over HTTP: who may, who takes over, what a restart finds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from linker_core.weights.checkpoint import Checkpoint
from server.onboarding.prepare import read_text_side
from server.registry.records import ModelState
from tests.server.fake_engine import Fault
from tests.server.held_encoder import BLOCKER, HELD_ENCODER, tasks
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import (
    held_up_scans,
    loads,
    locked_registry,
    open_registry,
    residual,
    until_job,
)
from tests.tiny import make_checkpoint, make_variant

NAMES = ("base", "near", "far", "odd")
KV: dict[str, dict[str, object]] = {"engine": {"kv_cache_tokens": 16}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A donor `base` and variants: `near` shares both blocks, `far` one of them, `odd` none."""
    base = make_checkpoint(tmp_path / "base")
    make_variant(tmp_path / "near", base, scale=0.01)
    with Checkpoint.open(base) as checkpoint:
        first = {name: 0.5 for name in checkpoint.tensors if ".layers.0." in name}
    make_variant(tmp_path / "far", base, scale=first, seed=2)
    make_variant(tmp_path / "odd", base, scale=0.5, seed=3)
    return tmp_path


@pytest.fixture
def live(root: Path) -> Iterator[LiveServer]:
    with serving(root) as server:
        onboard_all(server, root)
        yield server


def onboard_all(server: LiveServer, root: Path) -> None:
    for name in NAMES:
        donor: dict[str, Any] = {} if name == "base" else {"donor": "base"}
        response = server.onboard(name, root / name, tau_cos=0.9, tau_frob=0.1, **donor)
        assert response.status_code == 201, response.text


def serving(root: Path, **more: Any) -> Any:
    return live_server(root / "state", root=root, limits=LIMITS, **more)


def card(server: LiveServer, name: str) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/models/{name}").json()
    return found


def donors(server: LiveServer) -> dict[str, str | None]:
    return {row.name: row.donor for row in server.services.roster.models()}


def resident(server: LiveServer) -> set[str]:
    return {model.name for model in server.services.catalog.models()}


def rehome(server: LiveServer, name: str) -> httpx.Response:
    return server.client.delete(f"/models/{name}", params={"rehome": True})


def unload(server: LiveServer, name: str, **more: Any) -> httpx.Response:
    return server.client.post("/models/unload", json={"model": name, **more})


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 409, response.text
    message: str = response.json()["error"]["message"]
    return message


def test_donor_with_variants_is_409_with_their_names_and_the_remedy(live: LiveServer) -> None:
    for response in (live.client.delete("/models/base"), unload(live, "base")):
        assert "near, far, odd" in refusal(response)
        assert "rehome=true" in refusal(response)
    assert resident(live) == set(NAMES)


def test_resident_variant_that_shares_most_takes_over(live: LiveServer) -> None:
    assert unload(live, "near").status_code == 200  # it shares more than `far`
    assert rehome(live, "base").status_code == 200
    assert donors(live) == {"near": "far", "far": None, "odd": "far"}
    assert {card(live, name)["family"] for name in ("near", "far", "odd")} == {"far"}
    for name in ("near", "far", "odd"):
        assert live.chat(name).status_code == 200, name  # `near` comes back over its new donor
    assert live.chat("base").status_code == 404
    models = live.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["far", "near", "odd"]


def test_family_none_of_which_is_resident_is_handed_over_in_rows(live: LiveServer) -> None:
    for name in ("near", "far", "odd"):
        assert unload(live, name).status_code == 200
    assert rehome(live, "base").status_code == 200
    assert donors(live) == {"near": None, "far": "near", "odd": "near"}
    assert resident(live) == set()
    assert live.client.get("/ready").status_code == 200  # a request would be answered
    assert live.chat("odd").status_code == 200
    assert resident(live) == {"near", "odd"}  # its donor came first, over the files of `base`


def test_handed_over_family_takes_new_variants_and_plans(live: LiveServer, root: Path) -> None:
    assert rehome(live, "base").status_code == 200
    head = next(name for name, donor in donors(live).items() if donor is None)
    plans = {row.name: row.plan for row in live.services.roster.models()}
    make_variant(root / "new", root / "base", scale=0.02, seed=7)
    assert live.onboard("new", root / "new").status_code == 201
    assert card(live, "new")["donor"] == head
    plan = live.services.roster.model("new").plan
    assert plan is not None
    assert plan["donor_fingerprint"] == plans["near"]["donor_fingerprint"]  # type: ignore[index]
    other = next(name for name in ("near", "odd") if name != head)
    job = live.client.patch(f"/models/{other}", json={"policy": "exact"}).json()
    until_job(live, job["id"], "succeeded")
    refused = live.client.patch(f"/models/{head}", json={"policy": "exact"})
    assert "is a donor" in refusal(refused)


def test_unloaded_donor_is_served_again_as_a_variant(live: LiveServer, root: Path) -> None:
    evicted = 'linker_evictions_total{reason="request"}'
    assert unload(live, "base", rehome=True).status_code == 200
    assert live.metric(evicted) == 1
    gone = card(live, "base")
    assert (gone["state"], gone["donor"]) == ("unloaded", "near")
    assert (gone["bytes"]["unique"], gone["blocks"]["alias"]) == (0, 2)
    assert live.chat("base").status_code == 200
    # The blocks are there; what nobody else aliases was read from its files.
    outside = read_text_side(root / "base").outside_blocks_bytes
    assert card(live, "base")["bytes"]["unique"] == outside
    assert len(live.services.registry.bases()) == 1
    # And it can take over again.
    assert unload(live, "near", rehome=True).status_code == 200
    assert donors(live) == {"base": None, "near": "base", "far": "base", "odd": "base"}
    for name in NAMES:
        assert live.chat(name).status_code == 200, name


def test_restart_finds_the_family_as_it_was_handed_over(root: Path) -> None:
    with serving(root) as server:
        onboard_all(server, root)
        assert rehome(server, "base").status_code == 200
        before = {row.name: row for row in server.services.roster.models()}
    with serving(root) as server:
        server.until_ready()
        for row in server.services.roster.models():
            known = before[row.name]
            assert (row.donor, row.plan, row.state) == (known.donor, known.plan, known.state)
        assert resident(server) == {"near", "far", "odd"}
        assert unload(server, "near", rehome=True).status_code == 200  # the base has files still
        for name in ("near", "odd", "far"):
            assert server.client.delete(f"/models/{name}", params={"rehome": True}).is_success
        assert server.services.registry.bases() == []


@pytest.mark.parametrize("unloaded", [False, True])
def test_start_with_a_deleted_donor_takes_it_into_the_family_that_shares_it(
    root: Path, *, unloaded: bool
) -> None:
    start = {"base": root / "base"}
    with serving(root, models=start) as server:
        server.until_ready()
        for name in ("near", "odd"):
            reply = server.onboard(name, root / name, donor="base", tau_cos=0.9, tau_frob=0.1)
            assert reply.status_code == 201
        assert rehome(server, "base").status_code == 200
        if unloaded:
            for name in ("odd", "near"):
                assert unload(server, name).status_code == 200
    make_variant(root / "new", root / "base", scale=0.02, seed=7)
    expected = {"near": None, "odd": "near", "base": "near"}
    for more in ({}, {"new": root / "new"}):
        with serving(root, models=start | more) as server:
            server.until_ready()
            expected |= dict.fromkeys(more, "near")
            for name in ("base", *more):
                server.until(lambda name=name: card(server, name)["state"] == "ready")
            assert donors(server) == expected
            shown = card(server, "base")
            assert shown["blocks"]["alias"] == 2
            assert shown["donor_choice"]["donor"] == "near"
            for name in expected:
                assert server.chat(name).status_code == 200, name
            snapshot = server.services.engine.snapshot
            assert snapshot is not None
            assert snapshot.models["base"].shared > 0
    assert loads(root / "base").count("base") == 3  # each start loaded it once


def test_job_of_the_family_is_in_the_way(live: LiveServer, root: Path) -> None:
    make_variant(root / "new", root / "base", scale=0.02, seed=7)
    with held_up_scans(live) as scans:
        job = live.onboard("new", root / "new", donor="base", wait=False).json()
        assert scans.begun.wait(30)
        for response in (rehome(live, "base"), unload(live, "base", rehome=True)):
            assert "'new' is being onboarded" in refusal(response)
    until_job(live, job["id"], "succeeded")
    assert rehome(live, "base").status_code == 200


def test_plan_that_is_being_made_is_in_the_way(root: Path) -> None:
    residual(root / "near", {"0.001": "int4:64"})
    with serving(root, encode_command=HELD_ENCODER) as server:
        onboard_all(server, root)
        (root / "base" / BLOCKER).touch()
        job = server.client.patch("/models/near", json={"policy": "budget"}).json()
        server.until(lambda: tasks(root / "base") == ["encode"])
        assert "'near' is being planned anew" in refusal(rehome(server, "base"))
        (root / "base" / BLOCKER).unlink()
        until_job(server, job["id"], "succeeded")
        assert rehome(server, "base").status_code == 200


def test_registry_that_cannot_be_written_leaves_the_family_as_it_is(live: LiveServer) -> None:
    with locked_registry(live):
        for response in (rehome(live, "base"), unload(live, "base", rehome=True)):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "not_ready"
        assert all(live.chat(name).status_code == 200 for name in NAMES)
    assert donors(live) == {"base": None, "near": "base", "far": "base", "odd": "base"}
    assert live.services.registry.bases() == []
    assert rehome(live, "base").status_code == 200


def test_handing_over_waits_for_answers_that_are_on_their_way(live: LiveServer) -> None:
    body = {"model": "base", "prompt": [Fault.WAIT, 50], "stream": True, "max_tokens": 50}
    done: list[httpx.Response] = []
    with live.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        leaving = threading.Thread(target=lambda: done.append(rehome(live, "base")))
        leaving.start()
        live.until(lambda: card(live, "far").get("donor") == "near")
        assert live.chat("base").status_code == 404
        assert all(live.chat(name).status_code == 200 for name in ("near", "far", "odd"))
        snapshot = live.services.engine.snapshot
        assert snapshot is not None
        assert "base" in snapshot.models
        assert "base" in refusal(live.client.delete("/models/near"))  # whose family it is in now
        assert done == []
    leaving.join(30)
    assert done[0].status_code == 200
    live.until(lambda: "base" not in live.services.engine.snapshot.models)  # type: ignore[union-attr]


def test_variant_whose_donor_was_deleted_meanwhile_is_planned_over_the_heir(
    root: Path,
) -> None:
    with serving(root) as server:
        onboard_all(server, root)
        assert rehome(server, "base").status_code == 200
        head = next(name for name, donor in donors(server).items() if donor is None)
        row = server.services.roster.model("odd")
        assert row.request["donor"] == "base"
    assert head != "odd"
    registry = open_registry(root / "state")
    registry.save(replace(row, state=ModelState.ONBOARDING))  # as a stop leaves it
    registry.close()
    with serving(root) as server:
        server.until(lambda: card(server, "odd")["state"] == "ready")
        assert card(server, "odd")["donor"] == head


def test_named_donor_that_is_unloaded_comes_back_for_its_variant(
    live: LiveServer, root: Path
) -> None:
    for name in ("near", "far", "odd", "base"):
        assert unload(live, name).status_code == 200
    make_variant(root / "new", root / "base", scale=0.02, seed=7)
    assert live.onboard("new", root / "new", donor="base").status_code == 201
    assert card(live, "new")["donor"] == "base"
    assert resident(live) == {"base", "new"}


@pytest.mark.parametrize("restarted", [False, True])
def test_model_finds_its_donor_among_unloaded_ones(root: Path, *, restarted: bool) -> None:
    make_variant(root / "new", root / "base", scale=0.02, seed=7)
    with serving(root) as server:
        onboard_all(server, root)
        for name in ("near", "far", "odd", "base"):
            assert unload(server, name).status_code == 200
        assert restarted or plan_new(server, root) == "base"
        if not restarted:
            assert server.onboard("new", root / "new").status_code == 201
            assert card(server, "new")["donor"] == "base"
            assert resident(server) == {"base", "new"}
    if restarted:
        with serving(root) as server:
            server.until(server.services.onboarder._restorer.done.is_set)
            assert plan_new(server, root) == "base"
            assert resident(server) == set()
            assert server.onboard("new", root / "new").status_code == 201
            assert card(server, "new")["donor"] == "base"


def plan_new(server: LiveServer, root: Path) -> str | None:
    """Returns the donor of a dry run."""
    response = server.client.post("/models/plan", json={"source": str(root / "new")})
    assert response.status_code == 200, response.text
    donor: str | None = response.json()["donor"]
    return donor


@pytest.mark.parametrize("pinned", [False, True])
def test_restart_without_room_for_all_keeps_the_pinned_and_the_last_used(
    root: Path, *, pinned: bool
) -> None:
    with serving(root, settings=KV) as server:
        onboard_all(server, root)
        rows = {row.name: row for row in server.services.roster.models()}
        held = {name: card(server, name)["bytes"]["unique"] for name in NAMES}
        snapshot = server.services.engine.snapshot
        assert snapshot is not None
        room = snapshot.device_kv_bytes + held["base"] + held["near"] + held["far"]
    assert held["near"] + held["far"] < held["odd"] + held["near"]
    registry = open_registry(root / "state")
    for age, name in enumerate(("far", "near", "base", "odd")):
        last_used_at = rows[name].created_at + 100 - age
        registry.save(
            replace(rows[name], last_used_at=last_used_at, pinned=pinned and name == "odd")
        )
    registry.close()
    tight = {"engine": {**KV["engine"], "memory_budget": room}}
    with serving(root, settings=tight) as server:
        server.until_ready()
        there = {"base", "odd"} if pinned else {"base", "near", "far"}
        assert resident(server) == there
        for name in set(NAMES) - there:
            assert card(server, name)["state"] == "unloaded"
            assert card(server, name)["error"] is None
        assert server.metric('linker_evictions_total{reason="capacity"}') == 0
        asked = server.complete("far" if pinned else "odd", [9, 10], max_tokens=2)
        assert asked.status_code == (507 if pinned else 200), asked.text


def test_unloaded_models_come_back_at_a_start_only_if_they_have_to(root: Path) -> None:
    with serving(root) as server:
        onboard_all(server, root)
        for name in ("near", "far", "odd", "base"):
            assert unload(server, name).status_code == 200
        odd = server.services.roster.model("odd")
    registry = open_registry(root / "state")
    registry.save(replace(odd, pinned=True))
    registry.close()
    with serving(root) as server:
        server.until_ready()
        assert resident(server) == {"base", "odd"}  # its donor for its sake
        server.services.engine.kill()
        server.until(lambda: resident(server) == set())
        server.until(lambda: resident(server) == {"base", "odd"})
        assert unload(server, "odd").status_code == 200
        killed = server.services.engine.pid
        server.services.engine.kill()
        server.until(lambda: server.services.engine.pid not in (None, killed))
        server.until(lambda: resident(server) == {"base"})  # another engine is no start
    assert loads(root / "near") == ["near"]
