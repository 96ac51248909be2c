"""Delta folders as sources: what is checked, against what, and under which name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.sharing.thresholds import load_tiers
from tests.server.held_encoder import BLOCKER, HELD_ENCODER, tasks
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import delta_folders, loads, residual, until_job
from tests.tiny import make_checkpoint, make_variant

KL = 0.004  # what the exporter measured
BUDGET: dict[str, dict[str, object]] = {"sharing": {"policy": "budget"}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a donor `base`, its variant `near`, and the latter's delta `shipped`."""
    root = tmp_path_factory.mktemp("exported")
    base = make_checkpoint(root / "base")
    near = residual(make_variant(root / "near", base, scale=0.01), {str(KL): "int4:64"})
    with live_server(root / "state", models={"base": base}, root=root, settings=BUDGET) as server:
        server.until_ready()
        assert server.onboard("near", near).status_code == 201
    [folder] = delta_folders(root / "state")
    (folder / "loads.log").unlink()
    folder.rename(root / "shipped")
    (base / "loads.log").unlink()
    return root


@pytest.fixture
def root(exported: Path, tmp_path: Path) -> Path:
    """The same for one test to change as it likes."""
    return shutil.copytree(exported, tmp_path / "root", ignore=shutil.ignore_patterns("state"))


@pytest.fixture
def live(root: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with serving(root, tmp_path) as server:
        server.until_ready()
        yield server


def serving(root: Path, tmp_path: Path, **more: Any) -> Any:
    options: dict[str, Any] = {
        "models": {"base": root / "base"}, "root": root, "limits": LIMITS, "settings": BUDGET,
        "encode_command": HELD_ENCODER,
    }  # fmt: skip
    return live_server(tmp_path / "state", **(options | more))


def refusal(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def flip(folder: Path) -> None:
    data = bytearray((folder / DELTA_FILE).read_bytes())
    data[-1] ^= 1
    (folder / DELTA_FILE).write_bytes(data)


def test_delta_is_read_to_its_end_and_served_under_its_own_digest(
    live: LiveServer, root: Path, tmp_path: Path
) -> None:
    card = live.onboard("near", root / "shipped").json()
    with DeltaFile.open(root / "shipped") as delta:
        claimed, digest = delta.plan, delta.fingerprint
    assert (card["plan"]["policy"], card["donor"], card["state"]) == ("delta", "base", "ready")
    assert card["fingerprint"] == digest != claimed.variant_fingerprint
    assert claimed.price is not None
    assert card["plan"]["price"] == claimed.price.to_json()
    assert card["plan"]["price_source"] == "claimed"
    assert (card["plan"]["budget_kl"], card["bytes"]["unique"]) == (None, claimed.unique_bytes)
    assert (tasks(root / "base"), loads(root / "shipped")) == (["verify"], ["near"])
    assert delta_folders(tmp_path / "state") == []  # it stays where it is
    text = live.client.get("/metrics").text
    assert 'linker_plan_kl_nats{model="near"}' not in text  # nobody has measured it here
    assert 'linker_block_cosine{block="0",model="near"}' not in text  # nobody has scanned it
    assert live.chat("near").status_code == 200


def test_import_uses_nothing_that_is_kept_under_the_claimed_fingerprint(
    live: LiveServer, root: Path
) -> None:
    original = live.onboard("near", root / "near").json()
    imported = live.onboard("copy", root / "shipped").json()
    assert imported["fingerprint"] != original["fingerprint"]
    assert (original["plan"]["policy"], original["plan"]["price_source"]) == ("budget", "measured")
    row = live.services.roster.model("copy")
    assert row.plan is not None
    assert row.plan["variant_fingerprint"] == imported["fingerprint"]


def test_dry_run_of_a_delta_loads_nothing(live: LiveServer, root: Path) -> None:
    body = {"source": str(root / "shipped")}
    answer = live.client.post("/models/plan", json=body).json()
    assert (answer["donor"], answer["policy"], answer["price"]["kl"]) == ("base", "delta", KL)
    assert (answer["price_source"], answer["within_budget"]) == ("claimed", None)
    assert set(answer["rung_bytes"]) == {"int4", "own"}
    assert answer["blocks"][0]["cos"] is None
    assert answer["blocks"][0]["rungs"]["mlp.up_proj.weight"] == "int4:64"
    assert answer["fits"] is True
    assert loads(root / "shipped") == []


@pytest.mark.parametrize("route", ["/models", "/models/plan"])
def test_no_budget_is_held_against_what_an_exporter_claims(
    live: LiveServer, root: Path, route: str
) -> None:
    body = {"name": "near", "source": str(root / "shipped"), "budget_kl": KL}
    error = refusal(live.client.post(route, json=body), 400)
    assert (error["param"], "claim" in error["message"]) == ("budget_kl", True)


@pytest.mark.parametrize(
    "option",
    [
        {"policy": "budget"},
        {"max_bytes": 10**9},
        {"tier": next(iter(load_tiers()))},
        {"tau_cos": 0.9},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_would_choose_another_plan_are_refused(
    live: LiveServer, root: Path, option: dict[str, Any]
) -> None:
    full = option | ({"tau_frob": 0.1} if "tau_cos" in option else {})
    error = refusal(live.onboard("near", root / "shipped", wait=False, **full), 400)
    assert (error["param"], "own plan" in error["message"]) == (next(iter(option)), True)


def test_delta_without_its_donor_is_409_and_names_it(tmp_path: Path, root: Path) -> None:
    make_checkpoint(root / "stranger", layers=3, seed=5)
    with serving(root, tmp_path, models={"stranger": root / "stranger"}) as server:
        server.until_ready()
        with DeltaFile.open(root / "shipped") as delta:
            wanted = delta.plan.donor_fingerprint
        for more in ({}, {"donor": "stranger"}):
            error = refusal(server.onboard("near", root / "shipped", wait=False, **more), 409)
            assert (error["param"], str(wanted) in error["message"]) == ("donor", True)
        assert refusal(
            server.onboard("near", root / "shipped", wait=False, donor="base"), 404
        )["param"] == "donor"  # fmt: skip
        assert server.onboard("base", root / "base").status_code == 201
        assert server.onboard("near", root / "shipped").json()["donor"] == "base"


def test_donor_that_is_on_its_way_is_waited_for(tmp_path: Path, root: Path) -> None:
    with serving(root, tmp_path, models={}) as server:
        server.until(lambda: server.services.engine_or_none() is not None)
        server.onboard("base", root / "base", wait=False)
        assert server.onboard("near", root / "shipped").json()["donor"] == "base"


def test_damaged_header_is_refused_at_once(live: LiveServer, root: Path) -> None:
    file = root / "shipped" / DELTA_FILE
    file.write_bytes(file.read_bytes()[:-1])
    error = refusal(live.onboard("near", root / "shipped", wait=False), 400)
    assert error["code"] == "bad_checkpoint"
    assert live.client.get("/models/near").status_code == 404


def test_damaged_data_is_refused_before_it_is_loaded(live: LiveServer, root: Path) -> None:
    flip(root / "shipped")
    error = refusal(live.onboard("near", root / "shipped"), 400)
    assert error["code"] == "bad_checkpoint"
    assert loads(root / "shipped") == []
    assert live.client.get("/models/near").json()["state"] == "failed"


def test_delta_that_is_edited_while_it_is_read_is_refused(live: LiveServer, root: Path) -> None:
    (root / "base" / BLOCKER).touch()
    job = live.onboard("near", root / "shipped", wait=False).json()
    live.until(lambda: tasks(root / "base") == ["verify"])
    copy = root / "shipped" / "new"
    copy.write_bytes((root / "shipped" / DELTA_FILE).read_bytes())
    copy.rename(root / "shipped" / DELTA_FILE)
    (root / "base" / BLOCKER).unlink()
    assert until_job(live, job["id"], "failed")["error"]["code"] == "bad_checkpoint"
    assert loads(root / "shipped") == []


@pytest.mark.parametrize("edited", [False, True])
def test_restart_brings_an_import_back_unless_it_was_edited(
    root: Path, tmp_path: Path, edited: bool
) -> None:
    with serving(root, tmp_path) as server:
        server.until_ready()
        before = server.onboard("near", root / "shipped").json()
    if edited:
        flip(root / "shipped")
    # At another precision, too: what an exporter claims is not measured again.
    settings = {**BUDGET, "engine": {"matmul_precision": "medium"}}
    with serving(root, tmp_path, settings=settings) as server:
        server.until_ready()
        server.until(lambda: server.services.onboarder.startup_failures() is not None)
        after = server.client.get("/models/near").json()
        assert after["state"] == ("failed" if edited else "ready")
        assert after["plan"] == before["plan"]
        assert server.chat("base").status_code == 200
    assert tasks(root / "base") == ["verify", "verify"]


def test_import_cannot_be_planned_anew_nor_lend(live: LiveServer, root: Path) -> None:
    live.onboard("near", root / "shipped")
    error = refusal(live.client.patch("/models/near", json={"budget_kl": 0.1}), 400)
    assert "plan of its own" in error["message"]
    error = refusal(live.onboard("more", root / "near", donor="near", wait=False), 409)
    assert error["param"] == "donor"


def test_start_up_model_may_be_a_delta(root: Path, tmp_path: Path) -> None:
    models = {"base": root / "base", "near": root / "shipped"}
    for _ in range(2):
        with serving(root, tmp_path, models=models) as server:
            server.until_ready()
            card = server.client.get("/models/near").json()
            assert (card["state"], card["plan"]["policy"]) == ("ready", "delta")
            assert card["plan"]["budget_kl"] is None
            assert len(server.client.get("/models/jobs").json()["data"]) == 2


def test_delta_beside_other_weights_is_refused(live: LiveServer, root: Path) -> None:
    shutil.copy(root / "near" / "model.safetensors", root / "shipped")
    error = refusal(live.onboard("near", root / "shipped", wait=False), 400)
    assert error["code"] == "bad_checkpoint"


def test_delta_whose_plan_was_forged_is_refused(live: LiveServer, root: Path) -> None:
    file = root / "shipped" / DELTA_FILE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    plan = json.loads(header["__metadata__"]["plan"])
    plan["unique_bytes"] -= 1  # to slip into a smaller budget
    header["__metadata__"]["plan"] = json.dumps(plan)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    error = refusal(live.onboard("near", root / "shipped", wait=False), 400)
    assert error["code"] == "bad_checkpoint"
