"""Rows E1-E4: doors that are open by mistake, in spelling, in time, or through a browser."""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest

from server.registry.records import Role
from tests.server.advisories.attacks import refused
from tests.server.keyed import client_of, give_key
from tests.server.live import LiveServer, live_server

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
OPERATORS = [
    ("GET", "/models"), ("POST", "/models"), ("POST", "/models/plan"), ("POST", "/models/load"),
    ("POST", "/models/unload"), ("GET", "/models/jobs"), ("GET", "/models/base"),
    ("PATCH", "/models/base"), ("DELETE", "/models/base"), ("DELETE", "/v1/models/base"),
    ("GET", "/metrics"), ("GET", "/models/jobs/x"), ("POST", "/models/jobs/x/cancel"),
]  # fmt: skip


class Keyed(NamedTuple):
    """A server that wants keys."""

    live: LiveServer
    admin: httpx.Client
    client: httpx.Client
    key: str
    stranger: httpx.Client


@pytest.fixture(scope="module")
def keyed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    state = tmp_path_factory.mktemp("keyed")
    admin, client = give_key(state, Role.ADMIN).key, give_key(state, Role.CLIENT).key
    models = {"base": root / "base", "near": root / "near"}
    with live_server(state, models=models, root=root) as live:
        live.until_ready()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(client_of(live, key)) for key in (admin, client, None)]
            yield Keyed(live, clients[0], clients[1], client, clients[2])


@pytest.fixture
def guarded(keyed: Keyed) -> Iterator[Keyed]:
    """Fails if an attack changed what the operator or another client sees."""

    def seen() -> list[Any]:
        models = keyed.admin.get("/models").json()["data"]
        names = [(model["id"], model["state"], model["pinned"]) for model in models]
        answer = keyed.client.post("/v1/chat/completions", json=CHAT)
        return [names, answer.json()["choices"]]

    before = seen()
    yield keyed
    assert seen() == before


@pytest.mark.parametrize(("method", "path"), OPERATORS)
def test_cve_2026_103270_operators_route_without_a_key(
    guarded: Keyed, method: str, path: str
) -> None:
    response = guarded.stranger.request(method, path, json={"model": "base"})
    refused(response, 401, "invalid_api_key")
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    refused(guarded.client.request(method, path, json={"model": "base"}), 403)


SPELLINGS = [
    "{}/", "/{}", "{}//", "/.{}", "{}/.", "/x/..{}", "{}%2f", "{}?", "{}#", "{};x=1", "{}%00",
    "{}%20", "/m/base{}", "/m/base/v1/..{}", "/m/a/b{}", "/v1/models/..{}", "/v1{}", "/health{}",
    "/health/..{}", "/%2e%2e{}", "\\{}", "{}\\", "/v1/models/x/../../..{}", "/ready;{}",
]  # fmt: skip
PROTECTED = ("linker_", "checkpoint", "fingerprint", "unique_bytes")  # what operators alone read


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_vllm_unprotected_list_other_spellings(guarded: Keyed, spelling: str) -> None:
    """Nobody without a key gets in, and a client nowhere but into the routes of clients."""
    for method, path in OPERATORS:
        for spelt in (spelling.format(path), spelling.format(path.upper())):
            for sent in {method, "HEAD", "OPTIONS", "GET"}:
                response = raw(guarded.live, sent, spelt, None)
                assert response.status in (400, 401, 403), spelt
                response = raw(guarded.live, sent, spelt, guarded.key)
                if response.status == 200:
                    assert sent in ("GET", "HEAD"), spelt
                    assert not any(word in response.text for word in PROTECTED), spelt


class Raw(NamedTuple):
    status: int
    text: str


def raw(live: LiveServer, method: str, target: str, key: str | None, **headers: str) -> Raw:
    """Sends a request line as it is."""
    port = urlsplit(live.url).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest(method, target, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        if key is not None:
            connection.putheader("Authorization", f"Bearer {key}")
        connection.endheaders()
        with connection.getresponse() as response:
            return Raw(response.status, response.read().decode(errors="replace"))


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Host": "127.0.0.1/health?"}, id="CVE-2026-48710"),
        pytest.param({"Host": "127.0.0.1:80/health#"}, id="fragment"),
        pytest.param({"Host": "x@127.0.0.1"}, id="PYSEC-2026-248"),
        pytest.param({"X-Original-URL": "/health"}, id="CVE-2026-49468"),
        pytest.param({"X-Rewrite-URL": "/health"}, id="rewrite"),
        pytest.param({"X-Forwarded-Prefix": "/health", "X-Forwarded-For": "127.0.0.1"}, id="proxy"),
        pytest.param({"X-HTTP-Method-Override": "HEAD"}, id="override"),
        pytest.param({"Forwarded": "for=127.0.0.1;host=localhost"}, id="forwarded"),
    ],
)
def test_header_that_claims_another_path(guarded: Keyed, headers: dict[str, str]) -> None:
    for method, path in OPERATORS:
        response = raw(guarded.live, method, path, None, **headers)
        assert response.status in (400, 401, 403), path
    absolute = raw(guarded.live, "GET", "http://127.0.0.1/models", None)
    assert absolute.status == 401


def test_key_compare_does_the_same_work_for_every_key(
    guarded: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    plain = hmac.compare_digest

    def counted(first: Any, second: Any) -> bool:
        compared.append((len(first), len(second)))
        return plain(first, second)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    tries = [guarded.key, guarded.key[:-1] + "x", guarded.key[:12], "unknown", "x" * 5000]
    for key in tries:
        status = raw(guarded.live, "GET", "/v1/models", key).status
        assert status == (200 if key == guarded.key else 401)
    assert len(compared) == len(tries)
    assert len(set(compared)) == 1  # digests of one length, once a request


@pytest.mark.parametrize("source_of", ["CVE-2025-59425", "CVE-2026-23996"])
def test_unknown_key_is_answered_like_a_wrong_one(guarded: Keyed, source_of: str) -> None:
    if source_of == "CVE-2025-59425":  # shares most of its characters with a good one
        keys = [guarded.key[:-1] + ("x" if guarded.key[-1] != "x" else "y"), "sk-unknown"]
    else:  # has the public part of a good one
        keys = [guarded.key[:16] + "0" * (len(guarded.key) - 16), "0" * len(guarded.key)]
    answers = [raw(guarded.live, "GET", "/v1/models", key) for key in keys]
    assert [answer.status for answer in answers] == [401, 401]
    assert answers[0].text == answers[1].text
    assert not any(guarded.key[:16] in answer.text for answer in answers)


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("evil.example", id="CVE-2024-28224"),
        pytest.param("127.0.0.1.evil.example", id="suffix"),
        pytest.param("localhost.evil.example:8000", id="port"),
        pytest.param("0.0.0.0", id="zero"),
        pytest.param("169.254.169.254", id="metadata"),
    ],
)
def test_dns_rebinding_names_another_host(target: LiveServer, host: str) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/models"), ("GET", "/metrics")):
        assert raw(target, method, path, None, Host=host).status in (400, 403)


@pytest.mark.parametrize(
    "origin",
    [
        pytest.param("http://evil.example", id="CVE-2025-62593"),
        pytest.param("null", id="null"),
        pytest.param("http://127.0.0.1.evil.example", id="suffix"),
        pytest.param("https://localhost.evil.example", id="https"),
    ],
)
def test_page_of_another_site_posts_without_a_preflight(
    target: LiveServer, root: Path, origin: str
) -> None:
    headers = {"Origin": origin, "Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}
    body = json.dumps({"name": "attack", "source": str(root / "near")})
    for path in ("/models", "/models/unload", "/v1/chat/completions", "/models/plan"):
        refused(target.client.post(path, content=body, headers=headers), 403)
    assert target.client.get("/models/attack").status_code == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/models", "/health"])
def test_llama_cpp_issue_31054_origin_is_never_reflected(target: LiveServer, path: str) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET", "POST"):
        response = target.client.request(method, path, headers=headers)
        assert not any(name.startswith("access-control") for name in response.headers)
        assert method != "OPTIONS" or response.status_code in (403, 405)
