from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from server.gateway.prefix import SCOPE_MODEL, ModelPrefix
from tests.server.live import LiveServer

MESSAGES = [{"role": "user", "content": "hi"}]


def rewritten(path: str) -> tuple[str, str | None]:
    """Returns the path that the application sees, and the model beside it."""
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    async def receive() -> Message:
        raise AssertionError("nobody reads")

    async def send(_message: Message) -> None:
        raise AssertionError("nobody writes")

    scope = {"type": "http", "path": path, "raw_path": path.encode("utf-8", "replace")}
    asyncio.run(ModelPrefix(app)(scope, receive, send))
    [after] = seen
    return after["path"], after.get(SCOPE_MODEL)


@pytest.mark.parametrize(
    ("path", "rest", "model"),
    [
        ("/m/base/v1/completions", "/v1/completions", "base"),
        ("/m/acme/chat/v1/chat/completions", "/v1/chat/completions", "acme/chat"),
        ("/m/base/tokenizer_info", "/tokenizer_info", "base"),
        ("/m/acme/chat/tokenize", "/tokenize", "acme/chat"),
        ("/m/v1/v1/models", "/v1/models", "v1"),
        ("/m/acme/v1/v1/completions", "/v1/completions", "acme/v1"),
        ("/m/acme/tokenize/detokenize", "/detokenize", "acme/tokenize"),
        ("/m/m/m/v1/models", "/v1/models", "m/m"),
    ],
)
def test_prefix_names_the_model(path: str, rest: str, model: str) -> None:
    assert rewritten(path) == (rest, model)


@pytest.mark.parametrize(
    "path",
    [
        "/m", "/m/", "/m/base", "/m/base/", "/m/base/models", "/m/base/metrics", "/m/base/health",
        "/m/a/b/c/v1/completions", "/M/base/v1/completions", "//m/base/v1/completions",
        "/m//v1/completions", "/m/base/tokenize/", "/m/base/v1", "/v1/m/base/v1/completions",
    ],
)  # fmt: skip
def test_other_paths_stay_as_they_are(path: str) -> None:
    assert rewritten(path) == (path, None)


@given(st.text(alphabet="m/v1abc.tokenize%\n", max_size=40))
def test_a_path_is_rewritten_once_at_most(rest: str) -> None:
    path, _model = rewritten("/m/" + rest)
    assert path == "/m/" + rest or rewritten(path) == (path, None)


def test_model_in_the_path_is_enough(server: LiveServer) -> None:
    post = server.client.post
    chat = post("/m/near/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2})
    text = post("/m/near/v1/completions", json={"prompt": "ab", "max_tokens": 2})
    assert [chat.status_code, text.status_code] == [200, 200]
    assert chat.json()["model"] == text.json()["model"] == "near"


@pytest.mark.parametrize(
    "path", ["v1/chat/completions", "v1/completions", "tokenize", "detokenize"]
)
def test_model_in_the_body_must_be_the_same(server: LiveServer, path: str) -> None:
    body: dict[str, Any] = {"tokens": [65], "max_tokens": 1}
    body |= {"messages": MESSAGES} if "chat" in path else {"prompt": "ab"}
    for model, status in (("near", 200), ("base", 400), ("nobody", 400), (7, 400), ({}, 400)):
        response = server.client.post(f"/m/near/{path}", json={**body, "model": model})
        assert response.status_code == status, response.text
        if status == 400:
            assert response.json()["error"]["param"] == "model"


def test_unknown_model_in_the_path_is_not_found(server: LiveServer) -> None:
    for path in (
        "/m/nobody/tokenizer_info",
        "/m/acme/nobody/tokenizer_info",
        "/m/nobody/v1/models",
        "/m/acme/nobody/v1/models",
    ):
        response = server.client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    response = server.client.post("/m/nobody/v1/completions", json={"prompt": "a"})
    assert response.status_code == 404


def test_list_of_a_models_own_path_has_that_model_alone(server: LiveServer) -> None:
    whole = server.client.get("/v1/models").json()["data"]
    assert len(whole) > 1
    for card in whole:
        one = server.client.get(f"/m/{card['id']}/v1/models")
        assert (one.status_code, one.json()) == (200, {"object": "list", "data": [card]})


def test_rest_of_a_path_keeps_its_methods(server: LiveServer) -> None:
    response = server.client.get("/m/near/v1/completions")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    assert server.client.get("/m/near/v1/models").status_code == 200
