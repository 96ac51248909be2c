"""The bound on prompts whose answers have not begun, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.fake_engine import Fault
from tests.server.live import LiveServer, live_server

LIMIT = 100


@pytest.fixture(scope="module")
def bounded(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    state = tmp_path_factory.mktemp("bounded")
    settings = {"http": {"max_waiting_prompt_tokens": LIMIT}}
    with live_server(state, models={"base": family / "base"}, settings=settings) as live:
        live.until_ready()
        yield live


def test_prompts_that_would_never_be_admitted_are_400(bounded: LiveServer) -> None:
    response = bounded.complete("base", [[50] * 51, [51] * 50], max_tokens=1)
    assert response.status_code == 400
    assert "at most 100 wait" in response.json()["error"]["message"]
    assert bounded.complete("base", [[50] * 50, [51] * 50], max_tokens=1).status_code == 200


def test_choices_of_a_prompt_wait_for_it_once(bounded: LiveServer) -> None:
    assert bounded.complete("base", [50] * LIMIT, n=3, max_tokens=1).status_code == 200


def test_prompts_in_wait_refuse_others_until_their_answers_begin(bounded: LiveServer) -> None:
    gate = bounded.services.gate
    with gate.admit(1, prompt_tokens=LIMIT - 10) as place:
        refused = bounded.complete("base", [50] * 20, max_tokens=1)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        assert bounded.complete("base", [50] * 10, max_tokens=1).status_code == 200
        place.begun()
        assert bounded.complete("base", [50] * 20, max_tokens=1).status_code == 200


def test_an_answer_that_has_begun_holds_no_room_for_prompts(bounded: LiveServer) -> None:
    body = {"model": "base", "prompt": [Fault.MUTE] + [50] * 89, "max_tokens": 9, "stream": True}
    with bounded.client.stream("POST", "/v1/completions", json=body) as stream:
        assert next(stream.iter_lines()).startswith("data: ")
        assert bounded.complete("base", [50] * LIMIT, max_tokens=1).status_code == 200
    bounded.until(lambda: bounded.services.gate.waiting.taken == 0)
