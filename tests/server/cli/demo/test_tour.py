from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from linker_core.errors import LinkerError
from server.cli.demo.recipes import MODELS
from server.cli.demo.tour import QUESTIONS, Tour


class Server:
    """Answers as scripted; each path gives its replies in turn, the last one again and again."""

    def __init__(self, replies: dict[str, list[tuple[int, Any]]]) -> None:
        self.requests: list[httpx.Request] = []
        self._replies = {path: list(given) for path, given in replies.items()}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        given = self._replies[f"{request.method} {request.url.path}"]
        status, body = given.pop(0) if len(given) > 1 else given[0]
        if isinstance(body, Exception):
            raise body
        return httpx.Response(status, json=body)

    def bodies(self) -> list[Any]:
        return [json.loads(request.content) for request in self.requests if request.content]


def tour(server: Callable[[httpx.Request], httpx.Response], *, alive: bool = True) -> Tour:
    client = httpx.Client(transport=httpx.MockTransport(server), base_url="http://server")
    return Tour(client, lambda: alive)


def job(status: str, **fields: Any) -> dict[str, Any]:
    return {"id": "job-1", "model": "chat", "status": status, "stage": "scanning",
            "progress": {"done_bytes": 1, "total_bytes": 2}, "error": None, **fields}  # fmt: skip


def ignore(_model: str, _stage: str, _done: int, _total: int) -> None:
    pass


def test_wait_until_up_waits_for_the_port_and_for_health() -> None:
    server = Server(
        {"GET /health": [(0, httpx.ConnectError("refused")), (503, {}), (200, {"status": "ok"})]}
    )
    tour(server).wait_until_up()
    assert len(server.requests) == 3


def test_wait_until_up_ends_when_the_server_has_ended() -> None:
    server = Server({"GET /health": [(0, httpx.ConnectError("refused"))]})
    with pytest.raises(LinkerError, match="server ended"):
        tour(server, alive=False).wait_until_up()


def test_onboard_follows_the_job_until_the_model_is_ready() -> None:
    server = Server(
        {
            "POST /models": [(503, {}), (202, job("queued"))],
            "GET /models/jobs/job-1": [(200, job("running")), (200, job("succeeded"))],
            "GET /models/chat": [(200, {"state": "onboarding"}), (200, {"state": "ready"})],
        }
    )
    stages: list[tuple[str, str, int, int]] = []
    assert tour(server).onboard("chat", Path("/m/chat"), lambda *stage: stages.append(stage))
    assert server.bodies()[-1] == {
        "name": "chat", "source": "/m/chat", "donor": "base",
    }  # fmt: skip
    assert stages[:2] == [("chat", "scanning", 1, 2)] * 2
    assert stages[2:] == [("chat", "coming back", 0, 0)]


def test_onboard_model_with_other_options_takes_it_as_it_is() -> None:
    server = Server(
        {
            "POST /models": [(409, {"error": {"message": "exists with other options"}})],
            "GET /models/chat": [(200, {"state": "onboarding"}), (200, {"state": "ready"})],
        }
    )
    assert not tour(server).onboard("chat", Path("/m/chat"), ignore)


def test_onboard_leaves_the_plan_to_the_server() -> None:
    ready = {f"GET /models/{name}": [(200, {"state": "ready"})] for name in MODELS}
    jobs = [(202, job("succeeded"))] * len(MODELS)
    server = Server({"POST /models": jobs, **ready})
    for name in MODELS:
        tour(server).onboard(name, Path("/m") / name, ignore)
    assert {key for body in server.bodies() for key in body} == {"name", "source", "donor"}


def test_onboard_the_donor_names_no_donor() -> None:
    server = Server(
        {
            "POST /models": [(202, job("succeeded"))],
            "GET /models/base": [(200, {"state": "ready"})],
        }
    )
    tour(server).onboard("base", Path("/m/base"), ignore)
    assert "donor" not in server.bodies()[0]


def test_onboard_failed_job_gives_the_servers_reason() -> None:
    failed = job("failed", error={"code": "bad_checkpoint", "message": "a shard is cut short"})
    server = Server({"POST /models": [(202, failed)]})
    with pytest.raises(LinkerError, match="a shard is cut short"):
        tour(server).onboard("chat", Path("/m/chat"), ignore)


def test_onboard_model_that_does_not_come_back_gives_the_servers_reason() -> None:
    lost = {"state": "failed", "error": {"message": "the files are not the same"}}
    server = Server({"POST /models": [(202, job("succeeded"))], "GET /models/chat": [(200, lost)]})
    with pytest.raises(LinkerError, match="not the same"):
        tour(server).onboard("chat", Path("/m/chat"), ignore)


def test_ask_chats_with_chat_models_and_completes_with_the_others() -> None:
    server = Server(
        {
            "POST /v1/chat/completions": [(200, {"choices": [{"message": {"content": "Sure"}}]})],
            "POST /v1/completions": [(200, {"choices": [{"text": " is used"}]})],
        }
    )
    asked = tour(server)
    assert asked.ask("chat") == "Sure"
    assert asked.ask("base") == " is used"
    chat, base = server.bodies()
    assert chat["messages"] == [{"role": "user", "content": QUESTIONS["chat"].text}]
    assert base["prompt"] == QUESTIONS["base"].text
    assert chat["temperature"] == base["temperature"] == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [({"error": {"message": "no such model"}}, "no such model"), (["odd"], "odd")],
)
def test_refusal_gives_the_servers_message(body: object, expected: str) -> None:
    server = Server({"POST /v1/completions": [(404, body)]})
    with pytest.raises(LinkerError, match=expected):
        tour(server).ask("base")
