from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.routing import Route

from linker_core.errors import NotReadyError
from server.bridge.client import EngineClient
from server.gateway.access import AUDIENCES, Audience, audience_of
from server.gateway.app import create_app
from server.registry.keys import digest_of
from server.registry.records import KeyRecord, Role
from tests.server.keyed import client_of, give_key, revoke_key
from tests.server.live import DEADLINE_S, LiveServer, live_server

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


class Keyed(NamedTuple):
    """A server that wants keys, and some."""

    live: LiveServer
    keys: dict[Role, str]
    state: Path
    revoked: str = ""

    def client(self, role: Role | None) -> httpx.Client:
        return client_of(self.live, None if role is None else self.keys[role] or None)


@pytest.fixture(scope="module")
def keyed(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    state = tmp_path_factory.mktemp("keyed")
    keys = {role: give_key(state, role).key for role in Role}
    revoked = give_key(state, Role.ADMIN)
    revoke_key(state, revoked)
    with live_server(state, models={"base": family / "base"}, root=family) as live:
        live.until_ready()
        yield Keyed(live, keys, state, revoked.key)


def routes(live: LiveServer) -> set[tuple[str, str]]:
    """Returns every path template with every method that it takes."""
    found, left = set(), list(create_app(live.services).routes)
    while left:
        route = left.pop()
        if (included := getattr(route, "original_router", None)) is not None:
            left += included.routes
            continue
        assert isinstance(route, Route), f"{route}: a kind of route that nobody classifies"
        found |= {(route.path, method) for method in route.methods or ()}
    return found


def test_every_route_is_classified_and_nothing_else_is(keyed: Keyed) -> None:
    classified = {(path, method) for path, methods in AUDIENCES.items() for method in methods}
    assert routes(keyed.live) == classified


def test_two_routes_are_open_to_anyone() -> None:
    anyone = {path for path, methods in AUDIENCES.items() if Audience.ANYONE in methods.values()}
    assert anyone == {"/health", "/ready"}


def test_every_route_is_shut_to_the_keys_it_is_not_for(keyed: Keyed) -> None:
    """Shows every route every kind of key; what is let through may fail for want of a body."""
    live = keyed.live
    shown: dict[Role | str | None, str | None] = {None: None, "revoked": keyed.revoked}
    shown |= {role: key for role, key in keyed.keys.items()}  # noqa: C416 - of wider types
    for path, method in sorted(routes(live)):
        audience = AUDIENCES[path][method]
        if path == "/models/events":
            continue  # a stream without an end; see below
        concrete = path.replace("{name:path}", "no/such").replace("{job_id}", "no-such")
        for who, key in shown.items():
            with client_of(live, key) as client:
                status = client.request(method, concrete).status_code
            where = f"{method} {concrete} for {who}"
            if audience is Audience.ANYONE:
                assert status == 200, where
            elif not isinstance(who, Role):
                assert status == 401, where
            elif who in audience.value:
                assert status not in (401, 403, 405), where
            else:
                assert status == 403, where


def test_events_are_for_operators(keyed: Keyed) -> None:
    for role, status in [(None, 401), (Role.CLIENT, 403), (Role.METRICS, 403), (Role.ADMIN, 200)]:
        with keyed.client(role) as client, client.stream("GET", "/models/events") as response:
            assert response.status_code == status


def test_refusals_are_in_openais_shape_and_name_the_scheme(keyed: Keyed) -> None:
    with keyed.client(None) as client:
        response = client.get("/v1/models")
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        wrong = client.get("/v1/models", headers={"Authorization": "Bearer sk-wrong"})
        assert wrong.status_code == 401
        assert "sk-wrong" not in wrong.text
    with keyed.client(Role.CLIENT) as client:
        error = client.get("/models").json()["error"]
        assert (error["type"], error["code"]) == ("permission_error", "permission_denied")


@pytest.mark.parametrize(
    "header",
    [
        "{}", "Basic {}", "Bearer", "Bearer {} x", "Bearer {},", "Bearer x{}",
        "Bearer\t{}", "Token {}", "Bearer Bearer {}", 'Bearer "{}"',
    ],
)  # fmt: skip
def test_anything_but_one_bearer_key_is_no_key(keyed: Keyed, header: str) -> None:
    said = {"Authorization": header.format(keyed.keys[Role.ADMIN])}
    with keyed.client(None) as client:
        assert client.get("/models", headers=said).status_code == 401


def test_scheme_is_told_in_any_case_and_two_keys_are_none(keyed: Keyed) -> None:
    key = keyed.keys[Role.ADMIN]
    with keyed.client(None) as client:
        for scheme in ("bearer", "BEARER", "Bearer "):
            said = {"Authorization": f"{scheme} {key}"}
            assert client.get("/models", headers=said).status_code == 200
        twice = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")]
        assert client.get("/models", headers=twice).status_code == 401


@pytest.mark.parametrize("place", ["query", "cookie", "x-api-key", "body"])
def test_a_key_in_another_place_is_no_key(keyed: Keyed, place: str) -> None:
    key = keyed.keys[Role.ADMIN]
    with keyed.client(None) as client:
        if place == "query":
            response = client.get("/models", params={"api_key": key, "key": key})
        elif place == "body":
            response = client.post("/v1/completions", json={"api_key": key, "model": "base"})
        else:
            headers = {"cookie": f"key={key}"} if place == "cookie" else {place: key}
            response = client.get("/models", headers=headers)
    assert response.status_code == 401


def status_of(keyed: Keyed, method: str, target: str, role: Role | None = None) -> int:
    """Sends a target as it is, where httpx would tidy it up first."""
    headers = {} if role is None else {"Authorization": f"Bearer {keyed.keys[role]}"}
    address = keyed.live.url.removeprefix("http://")
    with contextlib.closing(HTTPConnection(address, timeout=DEADLINE_S)) as connection:
        connection.request(method, target, headers=headers)
        return connection.getresponse().status


# --- E1: paths that look like others ---------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/health/", "//health", "/Health", "/health/../models", "/health%2f..%2fmodels", "/ready/",
        "/health;/models", "/health%00", "/health?/models", "/./health", "/%68ealth/x", "/readyz",
        "/ready\\..\\models", "/metrics/", "/METRICS", "//metrics", "/models/", "//models",
        "/Models", "/%6dodels", "/models%2f", "/v1/../models", "/v1//models", "/v1/models/",
        "/docs", "/redoc", "/ui", "/analysis/x", "/v2/models", "/", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", _METHODS)
def test_no_spelling_of_a_path_is_open_without_a_key_vllm_unprotected_routes(
    keyed: Keyed, method: str, path: str
) -> None:
    status = status_of(keyed, method, path)
    if path == "/health?/models":
        # A query is no part of a path.
        assert status == (200 if method in ("GET", "HEAD") else 405)
    else:
        assert status in (400, 401)


@pytest.mark.parametrize("path", ["/Models", "/models/", "//models", "/v1/../models", "/%6dodels"])
def test_no_spelling_of_an_operators_path_is_open_to_a_client(keyed: Keyed, path: str) -> None:
    for method in ("GET", "POST", "PATCH", "DELETE", "HEAD", "OPTIONS"):
        assert status_of(keyed, method, path, Role.CLIENT) == 403


@pytest.mark.parametrize(
    ("method", "path", "client", "nobody"),
    [
        ("GET", "/m/base/v1/models", 200, 401),
        ("DELETE", "/m/base/v1/models/base", 403, 401),
        ("GET", "/m/base/tokenizer_info", 200, 401),
        ("GET", "/m/base/v1/../models", 403, 401),
        ("GET", "/m/base/v1/%2e%2e/models", 403, 401),
        ("GET", "/m/health/v1/health", 403, 401),
        ("GET", "/m/base/health", 403, 401),
        ("GET", "/m/base/models", 403, 401),
        ("GET", "/m/m/base/v1/models", 404, 401),  # a model named m/base: there is none
        ("GET", "/m/a/b/c/v1/models", 403, 401),
        ("GET", "/M/base/v1/models", 403, 401),
        ("GET", "//m/base/v1/models", 403, 401),
    ],
)
def test_a_model_in_the_path_changes_nobodys_rights(
    keyed: Keyed, method: str, path: str, client: int, nobody: int
) -> None:
    assert status_of(keyed, method, path, Role.CLIENT) == client
    assert status_of(keyed, method, path) == nobody


_PATHS = st.lists(
    st.sampled_from(
        [*[part for path in AUDIENCES for part in path.split("/") if part], "", "..", ".", "%2e"]
    ),
    max_size=5,
).map(lambda parts: "/" + "/".join(parts)) | st.text(
    string.ascii_letters + "/.%{};:@~-_", min_size=1, max_size=30
).map(lambda text: f"/{text}")


@given(method=st.sampled_from(_METHODS), path=_PATHS)
@example(method="GET", path="/v1/models/../../models")
@settings(max_examples=500)
def test_only_what_is_classified_is_for_others_than_operators(method: str, path: str) -> None:
    audience = audience_of(method, path)
    if audience is Audience.OPERATORS:
        return
    if path.startswith("/v1/models/"):
        assert method == "GET"
        assert audience is Audience.CLIENTS
    else:
        assert audience in AUDIENCES[path].values()


def test_a_methods_own_audience_decides_and_an_unknown_one_needs_the_strictest() -> None:
    assert audience_of("GET", "/v1/models/a/b") is Audience.CLIENTS
    assert audience_of("DELETE", "/v1/models/a/b") is Audience.OPERATORS
    assert audience_of("PUT", "/v1/models/a/b") is Audience.OPERATORS
    assert audience_of("POST", "/health") is Audience.ANYONE
    assert audience_of("OPTIONS", "/v1/chat/completions") is Audience.CLIENTS
    assert audience_of("get", "/models") is Audience.OPERATORS


# --- E2: hosts that look like paths ----------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["localhost/health?", "localhost/health#", "localhost\\health", "localhost:80/ready?x="],
)
def test_a_path_in_the_host_header_opens_nothing_starlette_cve_2026_48710(
    keyed: Keyed, host: str
) -> None:
    with keyed.client(None) as client:
        response = client.get("/models", headers={"Host": host})
    assert response.status_code in (400, 401)


def test_an_absolute_target_is_judged_by_its_path(keyed: Keyed) -> None:
    assert status_of(keyed, "GET", f"{keyed.live.url}/models") == 401
    assert status_of(keyed, "GET", "http://localhost/health/../models") == 401
    assert status_of(keyed, "GET", "http://evil.example/health") == 403


def test_no_origin_is_told_that_it_may_read_answers(keyed: Keyed) -> None:
    with keyed.client(Role.ADMIN) as client:
        for method in ("GET", "OPTIONS"):
            headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
            response = client.request(method, "/v1/models", headers=headers)
            assert not [name for name in response.headers if name.startswith("access-control")]


# --- keys come and go ------------------------------------------------------------------------


def test_a_running_server_notices_keys_that_are_made_and_revoked(keyed: Keyed) -> None:
    live = keyed.live
    made = give_key(keyed.state, Role.CLIENT)
    with client_of(live, made.key) as client:
        live.until(lambda: client.get("/v1/models").status_code == 200)
        revoke_key(keyed.state, made)
        live.until(lambda: client.get("/v1/models").status_code == 401)
    with keyed.client(Role.CLIENT) as client:
        assert client.get("/v1/models").status_code == 200


def test_a_revoked_key_hears_of_no_more_changes(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.ADMIN)
    with client_of(keyed.live, made.key) as client, keyed.client(Role.ADMIN) as operator:
        keyed.live.until(lambda: client.get("/models").status_code == 200)
        with client.stream("GET", "/models/events") as response:
            events = (line for line in response.iter_lines() if line)
            assert "snapshot" in next(events)
            revoke_key(keyed.state, made)
            keyed.live.until(lambda: client.get("/models").status_code == 401)
            assert operator.patch("/models/base", json={"pin": True}).status_code == 200
            error, done = events
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "invalid_api_key"
        assert done == "data: [DONE]"
        assert operator.patch("/models/base", json={"pin": False}).status_code == 200


def test_an_open_server_closes_with_its_first_key_and_stays_closed(tmp_path: Path) -> None:
    with live_server(tmp_path) as live, client_of(live, None) as client:
        assert client.get("/models").status_code == 200
        made = give_key(tmp_path, Role.ADMIN)
        live.until(lambda: client.get("/models").status_code == 401)
        with client_of(live, made.key) as owner:
            assert owner.get("/models").status_code == 200
            revoke_key(tmp_path, made)
            live.until(lambda: owner.get("/models").status_code == 401)
        assert client.get("/models").status_code == 401


def test_keys_are_good_while_the_registry_cannot_be_read(
    keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = keyed.live.services.keys
    reads: list[bool] = []

    def broken() -> list[KeyRecord]:
        reads.append(True)
        raise NotReadyError("The registry cannot be used at the moment; try again later.")

    monkeypatch.setattr(ring, "_read", broken)
    keyed.live.until(lambda: bool(reads))
    with keyed.client(Role.CLIENT) as client:
        assert client.get("/v1/models").status_code == 200


# --- limits ----------------------------------------------------------------------------------


def test_requests_of_a_key_are_bounded_with_when_to_come_again(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.CLIENT, requests_per_minute=3)
    with client_of(keyed.live, made.key) as client, keyed.client(Role.CLIENT) as other:
        keyed.live.until(lambda: client.get("/v1/models").status_code == 200)
        assert [client.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
        # What a key may not do counts as well.
        assert client.get("/models").status_code == 429
        refused = client.get("/v1/models")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert client.get("/health").status_code == 200
        assert other.get("/v1/models").status_code == 200


def test_tokens_of_a_key_are_bounded_and_others_go_on(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.CLIENT, tokens_per_minute=20)
    body = {"model": "base", "prompt": "abcd", "max_tokens": 16}
    with client_of(keyed.live, made.key) as client, keyed.client(Role.CLIENT) as other:
        keyed.live.until(lambda: client.get("/v1/models").status_code == 200)
        long = client.post("/v1/completions", json={**body, "prompt": "a" * 21})
        assert long.status_code == 400
        assert client.post("/v1/completions", json=body).status_code == 200
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert other.post("/v1/completions", json=body).status_code == 200


def test_parallel_answers_of_a_key_share_its_tokens(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.CLIENT, tokens_per_minute=100)
    body = {"model": "base", "prompt": "ab", "max_tokens": 60, "ignore_eos": True}

    def ask(client: httpx.Client) -> tuple[int, int]:
        response = client.post("/v1/completions", json=body)
        used = response.json()["usage"]["total_tokens"] if response.status_code == 200 else 0
        return response.status_code, used

    with client_of(keyed.live, made.key) as client, ThreadPoolExecutor(20) as threads:
        keyed.live.until(lambda: client.get("/v1/models").status_code == 200)
        answers = list(threads.map(ask, [client] * 20))
        assert {status for status, _ in answers} == {200, 429}
        assert 60 <= sum(used for _, used in answers) <= 100 + 60
        refused = client.post("/v1/completions", json={**body, "prompt": "a" * 90})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 120


def test_parallel_sequences_of_a_key_are_bounded(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.CLIENT, max_parallel=2)
    body = {"model": "base", "prompt": "abcd", "max_tokens": 2}
    with client_of(keyed.live, made.key) as client:
        keyed.live.until(lambda: client.get("/v1/models").status_code == 200)
        assert client.post("/v1/completions", json={**body, "n": 2}).status_code == 200
        assert client.post("/v1/completions", json={**body, "n": 3}).status_code == 400


def test_only_operators_go_before_others(keyed: Keyed) -> None:
    body = {"model": "base", "prompt": "abcd", "max_tokens": 1}
    for role, priority, status in [
        (Role.CLIENT, -1, 403), (Role.CLIENT, 0, 200), (Role.CLIENT, 7, 200), (Role.ADMIN, -1, 200),
    ]:  # fmt: skip
        with keyed.client(role) as client:
            response = client.post("/v1/completions", json={**body, "priority": priority})
            assert response.status_code == status
            assert status == 200 or response.json()["error"]["param"] == "priority"


# --- E5: what one key has asked shows in nothing that another one sees ------------------------


def salts(keyed: Keyed, role: Role, **more: object) -> list[str]:
    """Returns the salts under which the engine looks a request's prompts up."""
    seen, tenants = list[str](), set[str]()
    submit = EngineClient.submit

    def noting(client: EngineClient, *rest: Any, cache_salt: str, tenant: str, **more: Any) -> Any:
        seen.append(cache_salt)
        tenants.add(tenant)
        return submit(client, *rest, cache_salt=cache_salt, tenant=tenant, **more)

    with pytest.MonkeyPatch.context() as patch, keyed.client(role) as asking:
        patch.setattr(EngineClient, "submit", noting)
        body = {"model": "base", "prompt": "abcd", "max_tokens": 1, **more}
        assert asking.post("/v1/completions", json=body).status_code == 200
    key = keyed.keys[role]
    ids = {row.digest: row.id for row in keyed.live.services.registry.api_keys()}
    assert tenants == {ids[digest_of(key)] if key else ""}
    return seen


def test_prefixes_are_parted_by_key_and_then_by_salt_vllm_cve_2025_46570(keyed: Keyed) -> None:
    [plain], [again] = salts(keyed, Role.CLIENT), salts(keyed, Role.CLIENT)
    [salted], [other] = salts(keyed, Role.CLIENT, cache_salt="s"), salts(keyed, Role.ADMIN)
    assert plain == again
    assert len({plain, salted, other, "", "s"}) == 5
    [claimed] = salts(keyed, Role.ADMIN, cache_salt=plain)
    assert claimed != plain


def test_an_open_server_has_the_salts_that_clients_say(server: LiveServer) -> None:
    open_one = Keyed(server, dict.fromkeys(Role, ""), Path())
    assert salts(open_one, Role.CLIENT) == [""]
    assert salts(open_one, Role.CLIENT, cache_salt="s") == ["s"]
