"""Another plan for a model that serves: what changes, what does not, and when."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linker_core.sharing.delta_layout import DELTA_FILE
from tests.server.fake_engine import REPLACING, UNUSABLE, Fault
from tests.server.held_encoder import BLOCKER, HELD_ENCODER, tasks
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import (
    delta_folders,
    loads,
    locked_registry,
    residual,
    until_job,
)
from tests.tiny import make_checkpoint, make_variant

RUNGS = {"0.001": "int4:64", "0.02": "signs:64"}
BUDGET: dict[str, dict[str, object]] = {"sharing": {"policy": "budget"}}


@pytest.fixture
def live(tmp_path: Path, models: dict[str, Path]) -> Iterator[LiveServer]:
    """A server of `base` and of `near` in four bits."""
    residual(models["near"], RUNGS)
    with live_server(
        tmp_path / "state", models={"base": models["base"]}, root=tmp_path, limits=LIMITS,
        settings=BUDGET, encode_command=HELD_ENCODER,
    ) as server:  # fmt: skip
        server.until_ready()
        assert server.onboard("near", models["near"]).status_code == 201
        yield server


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of `base` and `near` that nothing changes."""
    root = tmp_path_factory.mktemp("settled")
    base = make_checkpoint(root / "base")
    near = make_variant(root / "near", base, scale=0.01)
    with live_server(root / "state", models={"base": base, "near": near}) as server:
        server.until_ready()
        yield server


def patch(server: LiveServer, name: str = "near", **options: Any) -> Any:
    return server.client.patch(f"/models/{name}", json=options)


def card(server: LiveServer, name: str = "near") -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/models/{name}").json()
    return found


def kinds(server: LiveServer) -> set[str]:
    return set(card(server)["plan"]["rung_bytes"])


def refusal(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_other_budget_changes_the_rungs_of_a_model_that_serves(
    live: LiveServer, tmp_path: Path
) -> None:
    before, [old] = card(live), delta_folders(tmp_path / "state")
    response = patch(live, budget_kl=0.03)
    assert response.status_code == 202
    job = response.json()
    assert response.headers["Location"] == f"/models/jobs/{job['id']}"
    done = until_job(live, job["id"], "succeeded")
    after = card(live)
    assert kinds(live) == {"signs", "own"}
    assert (after["plan"]["budget_kl"], after["plan"]["price"]["kl"]) == (0.03, 0.02)
    assert after["bytes"]["unique"] == done["result"]["bytes"]["unique"]
    assert after["bytes"]["unique"] < before["bytes"]["unique"]
    assert (after["state"], after["created_at"]) == ("ready", before["created_at"])
    live.until(lambda: len(delta_folders(tmp_path / "state")) == 1)  # swept after the job's end
    [new] = delta_folders(tmp_path / "state")
    assert (new != old, loads(new)) == (True, ["near"])
    assert live.metric('linker_model_rung_bytes{model="near",rung="int4"}') == 0
    assert live.chat("near").status_code == 200


def test_client_that_waits_gets_the_model_or_why_it_keeps_its_plan(live: LiveServer) -> None:
    def waiting(**options: Any) -> Any:
        return live.client.patch("/models/near", params={"wait": "true"}, json=options)

    response = waiting(budget_kl=0.03)
    assert (response.status_code, response.json()["id"]) == (200, "near")
    assert set(response.json()["plan"]["rung_bytes"]) == {"signs", "own"}
    assert waiting(budget_kl=0.03).json()["plan"] == response.json()["plan"]
    error = refusal(waiting(tau_cos=0.9, tau_frob=0.1, budget_kl=0.001), 400)
    assert error["code"] == "budget_exceeded"
    assert card(live)["plan"] == response.json()["plan"]


def test_same_options_return_the_job_that_made_the_plan(live: LiveServer) -> None:
    onboarded = live.client.get("/models/jobs").json()["data"][0]
    same = patch(live, budget_kl=0.01)
    assert (same.status_code, same.json()["id"]) == (200, onboarded["id"])
    job = patch(live, policy="budget", budget_kl=0.03).json()
    until_job(live, job["id"], "succeeded")
    again = patch(live, budget_kl=0.03)
    assert (again.status_code, again.json()["id"]) == (200, job["id"])


def test_same_options_right_after_the_end_of_a_job_return_it(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    async def held_up() -> None:
        await asyncio.to_thread(go_on.wait)

    monkeypatch.setattr(live.services.onboarder._sweeping, "sweep", held_up)
    try:
        job = patch(live, policy="budget", budget_kl=0.03).json()
        until_job(live, job["id"], "succeeded")
        again = patch(live, budget_kl=0.03)
        assert (again.status_code, again.json()["id"]) == (200, job["id"])
    finally:
        go_on.set()


def test_other_options_with_the_same_rungs_move_nothing(live: LiveServer, tmp_path: Path) -> None:
    job = patch(live, budget_kl=0.015).json()
    until_job(live, job["id"], "succeeded")
    assert card(live)["plan"]["budget_kl"] == 0.015
    [folder] = delta_folders(tmp_path / "state")
    assert loads(folder) == ["near"]


def test_plan_without_residuals_needs_no_folder(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    job = patch(live, policy="exact").json()
    until_job(live, job["id"], "succeeded")
    assert card(live)["plan"]["policy"] == "exact"
    live.until(lambda: not delta_folders(tmp_path / "state"))  # swept once the job has ended
    assert loads(models["near"]) == ["near"]


def test_stream_goes_on_while_its_model_gets_another_plan(live: LiveServer) -> None:
    body = {"model": "near", "prompt": [Fault.SLOW, 50], "stream": True, "max_tokens": 60}
    with live.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        until_job(live, patch(live, budget_kl=0.03).json()["id"], "succeeded")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_budget_that_cannot_be_kept_leaves_the_plan(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    before = card(live)
    job = patch(live, tau_cos=0.9, tau_frob=0.1, budget_kl=0.001).json()
    failed = until_job(live, job["id"], "failed")
    assert failed["error"]["code"] == "budget_exceeded"
    assert {**card(live), "last_used_at": None} == {**before, "last_used_at": None}
    assert live.chat("near").status_code == 200
    assert len(delta_folders(tmp_path / "state")) == 1
    assert live.onboard("near", models["near"]).status_code == 201  # it is the same still


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("refuse", "insufficient_capacity"),
        (UNUSABLE, "unusable_model"),
        ("die", "engine_failure"),
    ],
)
def test_engine_that_cannot_change_over_leaves_the_old_plan_serving(
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    code: str,
) -> None:
    monkeypatch.setenv(REPLACING, fault)
    residual(models["near"], RUNGS)
    with live_server(
        tmp_path / "state", models={"base": models["base"]}, root=tmp_path, limits=LIMITS,
        settings=BUDGET,
    ) as server:  # fmt: skip
        server.until_ready()
        before = server.onboard("near", models["near"]).json()
        failed = until_job(server, patch(server, budget_kl=0.03).json()["id"], "failed")
        assert failed["error"]["code"] == code
        server.until(lambda: server.chat("near").status_code == 200)
        after = card(server)
        assert (after["plan"], after["bytes"]) == (before["plan"], before["bytes"])
        server.until(lambda: len(delta_folders(tmp_path / "state")) == 1)  # the new one is swept
        [folder] = delta_folders(tmp_path / "state")
        assert loads(folder) == ["near"] * (2 if fault == "die" else 1)


def test_stop_in_the_middle_leaves_the_old_plan(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    (models["base"] / BLOCKER).touch()
    before = card(live)
    job = patch(live, budget_kl=0.03).json()
    live.until(lambda: tasks(models["base"]) == ["encode", "encode"])
    shutil.copytree(tmp_path / "state", tmp_path / "copy")  # as kill -9 would leave it
    (models["base"] / BLOCKER).unlink()
    with live_server(tmp_path / "copy", root=tmp_path, settings=BUDGET) as server:
        server.until_ready()
        assert card(server)["plan"] == before["plan"]
        assert server.client.get(f"/models/jobs/{job['id']}").json()["status"] == "failed"
        [folder] = delta_folders(tmp_path / "copy")
        assert (folder / DELTA_FILE).is_file()
        assert server.chat("near").status_code == 200


def test_requests_that_cross_a_change_of_plan_are_refused(
    live: LiveServer, models: dict[str, Path]
) -> None:
    (models["base"] / BLOCKER).touch()
    job = patch(live, budget_kl=0.03).json()
    live.until(lambda: tasks(models["base"]) == ["encode", "encode"])
    same = patch(live, budget_kl=0.03)
    assert (same.status_code, same.json()["id"]) == (202, job["id"])
    assert "planned anew" in refusal(patch(live, budget_kl=0.04), 409)["message"]
    assert "planned anew" in refusal(live.client.delete("/models/near"), 409)["message"]
    assert live.chat("near").status_code == 200
    (models["base"] / BLOCKER).unlink()
    until_job(live, job["id"], "succeeded")
    assert live.client.delete("/models/near").status_code == 200


def test_registry_that_cannot_be_written_hears_of_the_new_plan_later(
    live: LiveServer, models: dict[str, Path]
) -> None:
    (models["base"] / BLOCKER).touch()
    job = patch(live, budget_kl=0.03).json()
    live.until(lambda: tasks(models["base"]) == ["encode", "encode"])
    with locked_registry(live):
        (models["base"] / BLOCKER).unlink()
        until_job(live, job["id"], "succeeded")
        assert kinds(live) == {"signs", "own"}
    live.call(live.services.onboarder.flush_once())
    row = live.services.registry.model("near")
    assert row is not None
    assert row.plan == live.services.roster.model("near").plan
    assert row.request["budget_kl"] == 0.03


@pytest.mark.parametrize(
    ("name", "options", "status", "param"),
    [
        ("near", {}, 400, None),
        ("near", {"policy": "exact", "budget_kl": 0.1}, 400, "budget_kl"),
        ("near", {"policy": "delta"}, 400, "policy"),
        ("near", {"tau_cos": 0.9}, 400, "tau_frob"),
        ("near", {"source": "/x"}, 400, "source"),
        ("near", {"pin": "yes"}, 400, "pin"),
        ("near", {"budget_kl": -1}, 400, "budget_kl"),
        ("near", {"max_bytes": "many"}, 400, "max_bytes"),
        ("base", {"budget_kl": 0.1}, 409, None),
        ("nobody", {"budget_kl": 0.1}, 404, "model"),
    ],
)
def test_what_cannot_be_planned_anew_is_refused(
    settled: LiveServer, name: str, options: dict[str, Any], status: int, param: str | None
) -> None:
    assert refusal(patch(settled, name, **options), status)["param"] == param


def test_model_that_is_not_ready_is_refused(live: LiveServer, models: dict[str, Path]) -> None:
    live.onboard("too-big", models["near"])
    assert refusal(patch(live, "too-big", budget_kl=0.1), 409)["code"] == "conflict"
    (models["near"] / "tuner-waits").touch()
    job = live.onboard("slow", models["near"], budget_kl=0.5, wait=False).json()
    assert refusal(patch(live, "slow", budget_kl=0.1), 409)["code"] == "conflict"
    (models["near"] / "tuner-waits").unlink()
    until_job(live, job["id"], "succeeded")
    live.services.catalog.retract("near")  # as while it comes back
    response = patch(live, budget_kl=0.1)
    assert refusal(response, 503)["code"] == "not_ready"
    assert response.headers["Retry-After"]
