"""What comes back after a restart, and what happens to what cannot."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from server.bridge.supervisor import EngineState
from server.onboarding.planner import Planner
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
    returning = live.services.onboarder._restorer.returning
    returning._strikes["near"] = 1
    first = live.services.engine.pid
    live.services.engine.kill()
    live.until(lambda: live.services.engine.pid not in (first, None))
    live.until_ready()
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
