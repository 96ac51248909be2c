from __future__ import annotations

import re

import httpx
import pytest

from tests.server.fake_engine import Fault
from tests.server.live import LiveServer

MADE = re.compile(r"req-[0-9a-f]{32}")


def asked(server: LiveServer, *ids: str, path: str = "/health") -> str:
    response = server.client.get(path, headers=[("X-Request-Id", value) for value in ids])
    found = response.headers.get_list("x-request-id")
    assert len(found) == 1
    return found[0]


def test_harmless_id_comes_back(server: LiveServer) -> None:
    assert asked(server, "my-Request_17") == "my-Request_17"
    assert asked(server, "a" * 64) == "a" * 64


@pytest.mark.parametrize("said", ["", "a" * 65, "a b", "a/b", "http://x", "ä", "a.b", "{}"])
def test_other_id_is_replaced(server: LiveServer, said: str) -> None:
    response = server.client.get("/health", headers={b"X-Request-Id": said.encode()})
    assert MADE.fullmatch(response.headers["x-request-id"])


def test_two_ids_are_none(server: LiveServer) -> None:
    assert MADE.fullmatch(asked(server, "a", "b"))


def test_requests_without_an_id_get_one_each(server: LiveServer) -> None:
    assert len({asked(server) for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nothing"), ("PUT", "/v1/models"), ("POST", "/v1/completions"), ("HEAD", "/ready")],
)
def test_refusals_are_named_too(server: LiveServer, method: str, path: str) -> None:
    response = server.client.request(method, path, headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_named_and_have_ids_of_their_own(server: LiveServer, *, stream: bool) -> None:
    answers = [
        server.client.post(
            "/v1/completions",
            json={"model": "base", "prompt": [50], "max_tokens": 1, "stream": stream},
            headers={"X-Request-Id": "mine"},
        )
        for _ in range(2)
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine", "mine"]
    ids = {re.findall(r'"id":"([^"]+)"', answer.text)[0] for answer in answers}
    assert len(ids) == 2
    assert "mine" not in ids


def test_same_id_at_the_same_time_mixes_nothing_up(server: LiveServer) -> None:
    # Two requests of one id, one of which waits for ever: neither gets the other's answer.
    headers = {"X-Request-Id": "same"}
    body = {"model": "base", "prompt": [Fault.MUTE, 50], "max_tokens": 9, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body, headers=headers) as waiting:
        assert next(waiting.iter_bytes())
        other = {"model": "base", "prompt": [60], "max_tokens": 3}
        answer = server.client.post("/v1/completions", json=other, headers=headers)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 3


def test_fault_of_ours_is_named(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(*_arguments: object) -> None:
        raise RuntimeError("inside")

    with monkeypatch.context() as patch:
        patch.setattr("server.gateway.services.Services.why_not_ready", surprise)
        response = httpx.get(
            f"{server.url}/ready", headers={"X-Request-Id": "mine"}, trust_env=False
        )
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
