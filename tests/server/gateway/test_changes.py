"""Pins, aliases, how long models stay; loading and unloading on request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.live import LiveServer, live_server


@pytest.fixture(scope="module")
def live(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of `base` and `near`; every test leaves both resident and without an alias."""
    models = {"base": family / "base", "near": family / "near"}
    with live_server(tmp_path_factory.mktemp("changed"), models=models, root=family) as server:
        server.until_ready()
        yield server


def patch(server: LiveServer, name: str = "near", **body: Any) -> httpx.Response:
    return server.client.patch(f"/models/{name}", json=body)


def failure(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def listed(server: LiveServer) -> dict[str, dict[str, Any]]:
    data = server.client.get("/v1/models").json()["data"]
    return {model["id"]: model for model in data}


def test_options_are_set_shown_and_stored(live: LiveServer) -> None:
    card = patch(live, pin=True, keep_alive="5m").json()
    assert (card["id"], card["pinned"], card["keep_alive"]) == ("near", True, 300)
    row = live.services.registry.model("near")
    assert row is not None
    assert (row.pinned, row.keep_alive_s) == (True, 300)
    assert patch(live, keep_alive=-1).json()["keep_alive"] == -1
    after = patch(live, pin=False, keep_alive=None).json()
    assert (after["pinned"], after["keep_alive"]) == (False, None)


def test_alias_answers_for_its_model_until_it_is_taken_away(live: LiveServer) -> None:
    assert patch(live, alias="acme/best").json()["alias"] == "acme/best"
    assert live.chat("acme/best").status_code == 200
    assert live.client.get("/models/acme/best").json()["id"] == "near"
    card = listed(live)["acme/best"]
    assert (card["root"], card["parent"], card["status"]) == ("near", "base", "ready")
    assert live.client.get("/v1/models/acme/best").json() == card
    refused = live.client.delete("/models/acme/best")
    assert "an alias of the model 'near'" in failure(refused, 404)["message"]
    assert patch(live, "acme/best", alias=None).json()["alias"] is None
    assert failure(live.chat("acme/best"), 404)["code"] == "model_not_found"


def test_names_and_aliases_are_of_one_space(live: LiveServer, family: Path) -> None:
    assert failure(patch(live, alias="base"), 409)["param"] == "alias"
    assert failure(patch(live, alias="a b"), 400)["param"] == "alias"
    assert failure(patch(live, alias="jobs"), 400)["param"] == "alias"
    patch(live, alias="other")
    assert failure(patch(live, "base", alias="other"), 409)["param"] == "alias"
    assert failure(live.onboard("other", family / "other", wait=False), 409)["param"] == "name"
    patch(live, alias=None)


def test_change_that_is_refused_changes_nothing(live: LiveServer) -> None:
    assert (
        failure(patch(live, pin=True, policy="exact", budget_kl=0.1), 400)["param"] == "budget_kl"
    )
    assert failure(patch(live, pin=True, alias="base"), 409)["param"] == "alias"
    assert live.client.get("/models/near").json()["pinned"] is False


@pytest.mark.parametrize("body", [{}, {"pin": None}, {"policy": None, "max_bytes": None}])
def test_change_that_says_nothing_is_told_all_that_it_may_say(
    live: LiveServer, body: dict[str, Any]
) -> None:
    for name in ("near", "base"):
        message = failure(patch(live, name, **body), 400)["message"]
        for field in ("pin", "alias", "keep_alive", "policy", "budget_kl", "max_bytes", "tier"):
            assert field in message


def test_failed_model_says_why_and_what_to_do(live: LiveServer, family: Path) -> None:
    assert failure(live.onboard("dead", family / "far", policy="bytes", max_bytes=0), 400)
    card = live.client.get("/models/dead").json()
    assert card["state"] == "failed"
    asked = live.client.post("/models/load", json={"model": "dead"})
    for response in (asked, live.chat("dead"), live.client.get("/v1/models/dead")):
        message = failure(response, 503)["message"]
        for said in (card["error"]["message"], "POST /models", "delete"):
            assert said in message
    assert failure(patch(live, "dead", pin=True), 409)["param"] == "pin"
    assert patch(live, "dead", alias="late").status_code == 200
    assert live.client.get("/models/dead").json()["pinned"] is False
    assert live.client.delete("/models/dead").status_code == 200


def test_name_that_cannot_be_a_models_is_not_repeated_in_full(
    live: LiveServer, family: Path
) -> None:
    long = "x" * 5_000
    refused = live.onboard("late", family / "far", donor=long, wait=False)
    deleted = live.client.delete(f"/models/{long}")
    for response in (live.chat(long), refused, deleted, patch(live, long, pin=True)):
        assert len(failure(response, 404)["message"]) < 300


def test_options_beside_a_plan_are_set_with_its_job(live: LiveServer) -> None:
    response = patch(live, pin=True, policy="thresholds", tau_cos=0.5, tau_frob=0.9)
    assert response.status_code in (200, 202)
    assert response.json()["object"] == "model.job"
    assert live.client.get("/models/near").json()["pinned"] is True
    live.call(live.services.onboarder.wait(response.json()["id"]))
    assert live.client.get("/models/near").json()["pinned"] is True
    patch(live, pin=False)


def test_onboarding_takes_options_that_are_no_part_of_what_is_asked(
    live: LiveServer, family: Path
) -> None:
    card = live.onboard("far", family / "far", pin=True, keep_alive=60).json()
    assert (card["pinned"], card["keep_alive"]) == (True, 60)
    first = live.onboard("far", family / "far", wait=False).json()
    again = live.onboard("far", family / "far", wait=False, pin=False, keep_alive=None).json()
    assert again["id"] == first["id"]
    card = live.client.get("/models/far").json()
    assert (card["pinned"], card["keep_alive"]) == (False, None)
    assert live.client.delete("/models/far").status_code == 200


def test_pin_that_is_set_while_a_model_comes_is_kept(live: LiveServer, family: Path) -> None:
    job = live.onboard("early", family / "far", wait=False).json()
    assert patch(live, "early", pin=True, alias="soon").status_code == 200
    live.call(live.services.onboarder.wait(job["id"]))
    card = live.client.get("/models/early").json()
    assert (card["state"], card["pinned"], card["alias"]) == ("ready", True, "soon")
    assert live.client.delete("/models/early").status_code == 200


def test_unloaded_model_stays_listed_and_comes_back(live: LiveServer) -> None:
    def ask(route: str, **body: Any) -> httpx.Response:
        return live.client.post(f"/models/{route}", json={"model": "near", **body})

    response = ask("unload")
    assert (response.status_code, response.json()["state"]) == (200, "unloaded")
    assert listed(live)["near"]["status"] == "unloaded"
    assert ask("unload").json()["state"] == "unloaded"
    assert live.services.catalog.get("near") is None
    response = ask("load")
    assert (response.status_code, response.json()["state"]) == (200, "ready")
    assert listed(live)["near"]["status"] == "ready"
    ask("unload")
    assert ask("load", wait=False).status_code == 202
    live.until(lambda: live.client.get("/models/near").json()["state"] == "ready")
    ask("unload")
    assert live.chat("near").status_code == 200


def test_unload_of_a_donor_in_use_is_409_with_its_dependants(live: LiveServer) -> None:
    response = live.client.post("/models/unload", json={"model": "base"})
    assert "near" in failure(response, 409)["message"]


@pytest.mark.parametrize("route", ["load", "unload"])
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [({}, 400, "model"), ({"model": "near", "more": 1}, 400, "more"),
     ({"model": "nobody"}, 404, "model"), ({"model": 3}, 400, "model")],
)  # fmt: skip
def test_what_cannot_be_loaded_or_unloaded_is_refused(
    live: LiveServer, route: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = live.client.post(f"/models/{route}", json=body)
    assert failure(response, status)["param"] == param


def test_donor_is_deleted_with_a_variant_in_its_place(family: Path, tmp_path: Path) -> None:
    models = {"base": family / "base", "near": family / "near"}
    with live_server(tmp_path / "state", models=models, root=family) as server:
        server.until_ready()
        fingerprint = server.client.get("/models/base").json()["fingerprint"]
        refused = server.client.delete("/models/base")
        assert "near" in failure(refused, 409)["message"]
        reply = server.client.delete("/models/base", params={"rehome": True})
        assert reply.json() == {"id": "base", "object": "model", "deleted": True}
        card = server.client.get("/models/near").json()
        assert (card["donor"], card["base"]) == (None, fingerprint)
        assert server.chat("near").status_code == 200
