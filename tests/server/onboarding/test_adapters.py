"""LoRA adapters as sources: which donor they go on, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.weights.lora_config import ADAPTER_CONFIG
from tests.lora import FILE, make_adapter
from tests.server.held_encoder import BLOCKER, HELD_ENCODER, tasks
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import delta_folders, loads, until_job
from tests.tiny import make_checkpoint


@pytest.fixture
def adapter(tmp_path: Path, models: dict[str, Path]) -> Path:
    return make_adapter(tmp_path / "adapter", models["base"])


def serving(tmp_path: Path, models: dict[str, Path], **more: Any) -> Any:
    options: dict[str, Any] = {
        "models": {"base": models["base"]}, "root": tmp_path, "limits": LIMITS,
        "encode_command": HELD_ENCODER,
    }  # fmt: skip
    return live_server(tmp_path / "state", **(options | more))


@pytest.fixture
def live(tmp_path: Path, models: dict[str, Path]) -> Iterator[LiveServer]:
    with serving(tmp_path, models) as server:
        server.until_ready()
        yield server


def refusal(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_adapter_becomes_low_rank_rungs_on_the_only_donor_it_fits(
    live: LiveServer, tmp_path: Path, models: dict[str, Path], adapter: Path
) -> None:
    response = live.onboard("tuned", adapter)
    assert response.status_code == 201, response.text
    card = response.json()
    assert (card["plan"]["policy"], card["donor"], card["plan"]["price"]) == (
        "adapter", "base", None,
    )  # fmt: skip
    held = card["plan"]["rung_bytes"]
    assert set(held) == {"alias", "lowrank"}
    assert held["lowrank"] == card["bytes"]["unique"]
    [folder] = delta_folders(tmp_path / "state")
    assert ((folder / DELTA_FILE).is_file(), loads(folder)) == (True, ["tuned"])
    assert tasks(models["base"]) == ["adapter"]  # neither scanned nor tuned
    seconds = live.client.get("/models/jobs").json()["data"][0]["result"]["seconds"]
    assert (seconds["scan"], seconds["tune"], seconds["encode"] > 0) == (0, 0, True)
    assert live.chat("tuned").status_code == 200


def test_restart_brings_an_adapter_back_from_its_folder(
    tmp_path: Path, models: dict[str, Path], adapter: Path
) -> None:
    for _ in range(2):
        with serving(tmp_path, models) as server:
            server.until_ready()
            assert server.onboard("tuned", adapter).json()["state"] == "ready"
    assert tasks(models["base"]) == ["adapter", "verify"]
    [folder] = delta_folders(tmp_path / "state")
    assert loads(folder) == ["tuned", "tuned"]
    (folder / DELTA_FILE).unlink()
    with serving(tmp_path, models) as server:
        server.until_ready()
        assert server.chat("tuned").status_code == 200
        assert server.client.delete("/models/tuned").status_code == 200
    assert tasks(models["base"])[2:] == ["adapter"]
    assert delta_folders(tmp_path / "state") == []


def test_adapter_that_was_changed_does_not_come_back(
    tmp_path: Path, models: dict[str, Path], adapter: Path
) -> None:
    with serving(tmp_path, models) as server:
        server.until_ready()
        server.onboard("tuned", adapter)
    data = bytearray((adapter / FILE).read_bytes())
    data[-1] ^= 1
    (adapter / FILE).write_bytes(data)
    with serving(tmp_path, models) as server:
        server.until_ready()
        server.until(lambda: server.services.onboarder.startup_failures() is not None)
        card = server.client.get("/models/tuned").json()
        assert (card["state"], card["error"]["code"]) == ("failed", "bad_checkpoint")
        assert server.chat("base").status_code == 200


def test_dry_run_of_an_adapter_leaves_nothing_behind(
    live: LiveServer, tmp_path: Path, adapter: Path
) -> None:
    answer = live.client.post("/models/plan", json={"source": str(adapter)}).json()
    assert (answer["policy"], answer["donor"]) == ("adapter", "base")
    assert set(answer["rung_bytes"]) == {"alias", "lowrank"}
    live.until(lambda: delta_folders(tmp_path / "state") == [])


def test_adapter_of_two_families_needs_a_name(
    tmp_path: Path, models: dict[str, Path], adapter: Path
) -> None:
    # Of another family by its head's width alone, so the adapter fits both.
    twin = make_checkpoint(tmp_path / "twin", seed=7)
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5, "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e5}}))  # fmt: skip
    with serving(tmp_path, models) as server:
        server.until_ready()
        assert server.onboard("org/twin", twin).json()["donor"] is None
        write_base(adapter, "somebody/else")
        error = refusal(server.onboard("tuned", adapter, wait=False), 400)
        assert (error["param"], "base, org/twin" in error["message"]) == ("donor", True)
        write_base(adapter, "/home/me/twin")
        assert server.onboard("by-name", adapter).json()["donor"] == "org/twin"
        assert server.onboard("tuned", adapter, donor="base").json()["donor"] == "base"


def write_base(adapter: Path, name: str) -> None:
    record = json.loads((adapter / ADAPTER_CONFIG).read_text())
    record["base_model_name_or_path"] = name
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(record))


def test_adapter_that_fits_no_donor_is_refused_at_once(live: LiveServer, tmp_path: Path) -> None:
    wide = make_checkpoint(tmp_path / "wide", hidden=64)
    stranger = make_adapter(tmp_path / "stranger", wide)
    error = refusal(live.onboard("tuned", stranger, wait=False, donor="base"), 400)
    assert error["code"] == "bad_checkpoint"
    # With one donor there is nothing to choose: what is wrong is the same.
    assert refusal(live.onboard("tuned", stranger, wait=False), 400) == error
    assert refusal(live.onboard("tuned", stranger, wait=False, donor="wide"), 404)
    assert live.client.get("/models/tuned").status_code == 404


@pytest.mark.parametrize("option", ["policy", "budget_kl", "max_bytes"])
def test_options_of_plans_are_refused(live: LiveServer, adapter: Path, option: str) -> None:
    value = "exact" if option == "policy" else 1
    error = refusal(live.onboard("tuned", adapter, wait=False, **{option: value}), 400)
    assert (error["param"], "own plan" in error["message"]) == (option, True)


def test_adapter_without_weights_is_refused(live: LiveServer, adapter: Path) -> None:
    (adapter / FILE).rename(adapter / "adapter_model.bin")
    error = refusal(live.onboard("tuned", adapter, wait=False), 400)
    assert error["code"] == "unsupported_format"
    (adapter / "adapter_model.bin").unlink()
    error = refusal(live.onboard("tuned", adapter, wait=False), 400)
    assert error["code"] == "bad_checkpoint"


def test_adapter_replaced_while_it_is_converted_is_refused(
    live: LiveServer, tmp_path: Path, models: dict[str, Path], adapter: Path
) -> None:
    (models["base"] / BLOCKER).touch()
    job = live.onboard("tuned", adapter, wait=False).json()
    live.until(lambda: tasks(models["base"]) == ["adapter"])
    copy = adapter / "new"
    copy.write_bytes((adapter / FILE).read_bytes())
    copy.rename(adapter / FILE)
    (models["base"] / BLOCKER).unlink()
    assert until_job(live, job["id"], "failed")["error"]["code"] == "bad_checkpoint"
    assert delta_folders(tmp_path / "state") == []
