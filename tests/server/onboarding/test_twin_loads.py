"""Twins that the engine does not survive, and donors that have to stay for them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from linker_core.engine.messages import Command, LoadModel
from linker_core.errors import EngineFailureError
from server.bridge.client import EngineClient
from server.onboarding.twin_rows import _PEACE_S, twin_name
from server.residency.room import Room
from tests.server.live import LiveServer

TWIN = twin_name("near")


def ask(live: LiveServer) -> httpx.Response:
    """Asks for the unshared weights, of a server that is ready."""
    live.until_ready()
    return live.complete("near", [9, 10], max_tokens=1, variant_mode="unshared")


@pytest.fixture
def deadly(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Has the engine die of every load of the twin, until it is undone."""
    put = EngineClient._put

    def dying(client: EngineClient, command: Command) -> None:
        if isinstance(command, LoadModel) and command.model == TWIN:
            live.services.engine.kill()
        else:
            put(client, command)

    monkeypatch.setattr(EngineClient, "_put", dying)
    return monkeypatch


def test_twin_that_the_engine_died_of_is_left_in_peace_for_a_while(
    live: LiveServer, deadly: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    for _ in range(2):
        deadly.setattr(live.services.twin_rows, "_clock", lambda: now)
        assert ask(live).status_code == 503
    deadly.undo()
    deadly.setattr(live.services.twin_rows, "_clock", lambda: now + _PEACE_S - 9.5)
    refused = ask(live)
    assert refused.status_code == 503
    assert "tried again in 10 s" in refused.json()["error"]["message"]
    assert refused.headers["Retry-After"] == "10"
    assert live.chat("near").status_code == 200
    deadly.setattr(live.services.twin_rows, "_clock", lambda: now + _PEACE_S)
    assert ask(live).status_code == 200


def test_twin_that_the_engine_dies_of_again_is_left_in_peace_again(
    live: LiveServer, deadly: pytest.MonkeyPatch
) -> None:
    for now in (0.0, 0.0, _PEACE_S):
        deadly.setattr(live.services.twin_rows, "_clock", lambda now=now: now)
        error = ask(live).json()["error"]["message"]
        assert "repeatedly" not in error
    assert "repeatedly" in ask(live).json()["error"]["message"]


def test_engine_that_ends_while_a_twin_waits_for_room_is_not_held_against_it(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end(_room: Room, _nbytes: int, **_options: Any) -> None:
        raise EngineFailureError("The engine stopped.")

    live.until_ready()
    with monkeypatch.context() as patch:
        patch.setattr(Room, "_make", end)
        for _ in range(3):
            error = ask(live).json()["error"]["message"]
            assert "stopped" in error
    assert ask(live).status_code == 200


def test_donor_of_a_model_and_its_twin_names_the_model_once(live: LiveServer) -> None:
    assert ask(live).status_code == 200
    assert {"near", TWIN} <= set(live.services.catalog.dependants("base"))
    response = live.client.post("/models/unload", json={"model": "base"})
    assert response.status_code == 409
    assert "is the donor of near, which" in response.json()["error"]["message"]
