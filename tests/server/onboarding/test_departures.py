"""Deletion while others lean on a model, while it is in use, and while it is coming back."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.server.fake_engine import STUCK, Fault
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.family import (
    held_up_scans,
    loads,
    locked_registry,
    open_registry,
    until_job,
)


def test_donor_of_a_variant_that_still_streams_is_409_until_it_has_gone(
    live: LiveServer, models: dict[str, Path]
) -> None:
    answers: list[httpx.Response] = []
    body = {"model": "near", "prompt": [Fault.WAIT, 50], "stream": True, "max_tokens": 50}
    with live.client.stream("POST", "/v1/completions", json=body):
        deleting = threading.Thread(
            target=lambda: answers.append(live.client.delete("/models/near"))
        )
        deleting.start()
        live.until(lambda: live.client.get("/models/near").status_code == 404)
        refused = live.client.delete("/models/base")
        assert refused.status_code == 409
        assert "near" in refused.json()["error"]["message"]
        again = live.onboard("near", models["near"], wait=False)
        assert again.status_code == 409
    deleting.join(30)
    assert answers[0].status_code == 200
    assert live.client.delete("/models/base").status_code == 200


def test_refused_unload_ends_the_wait_with_its_error(live: LiveServer) -> None:
    with pytest.raises(Exception, match="is the donor of near"):
        live.call(live.services.engine.client.unload("base"))
    assert live.chat("base").status_code == 200


def test_model_deleted_while_it_comes_back_stays_away(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    state = tmp_path / "state"
    with live_server(state, models=models, root=tmp_path) as server:
        server.until_ready()
    registry = open_registry(state)
    near = registry.model("near")
    assert near is not None
    # Used last, so it comes back before near.
    registry.save(replace(near, name=STUCK, last_used_at=near.created_at + 1e6))
    registry.close()
    with live_server(state) as server:
        server.until(lambda: STUCK in loads(models["near"]))
        assert server.client.delete("/models/near").status_code == 200
        assert server.client.delete(f"/models/{STUCK}").status_code == 200
        server.until_ready()
        for name in ("near", STUCK):
            assert server.client.get(f"/models/{name}").status_code == 404
            assert server.chat(name).status_code == 404
            assert server.services.registry.model(name) is None
        assert loads(models["near"]) == ["near", STUCK]


def test_deletion_that_cannot_be_stored_leaves_the_model_serving(
    live: LiveServer,
) -> None:
    with locked_registry(live):
        refused = live.client.delete("/models/near")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_ready"
        assert "locked" not in refused.text
        assert live.chat("near").status_code == 200
    assert live.client.delete("/models/near").status_code == 200


def test_donor_of_a_variant_that_is_being_scanned_is_409(
    live: LiveServer, models: dict[str, Path]
) -> None:
    assert live.client.delete("/models/near").status_code == 200
    with held_up_scans(live) as scans:
        job = live.onboard("again", models["near"], wait=False).json()
        assert scans.begun.wait(30)
        refused = live.client.delete("/models/base")
        assert refused.status_code == 409
        assert "again" in refused.json()["error"]["message"]
    until_job(live, job["id"], "succeeded")
