from __future__ import annotations

import contextlib
import string
from http.client import HTTPConnection

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.routing import Match, Route

from server.gateway.access import AUDIENCES, Audience, audience_of
from server.gateway.app import create_app
from server.registry.records import Role
from tests.server.keyed import Keyed, client_of
from tests.server.live import DEADLINE_S, LiveServer

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


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


def test_probes_and_the_empty_page_are_open_to_anyone() -> None:
    anyone = {path for path, methods in AUDIENCES.items() if Audience.ANYONE in methods.values()}
    assert anyone == {"/health", "/ready", "/", "/ui", "/ui/{file}"}


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
        concrete = concrete.replace("{file}", "index.html").replace("{family:path}", "no/such")
        for who, key in shown.items():
            with client_of(live, key) as client:
                status = client.request(method, concrete).status_code
            where = f"{method} {concrete} for {who}"
            if audience is Audience.ANYONE:
                assert status == (307 if path == "/" else 200), where
            elif audience is Audience.VISITORS and who is None:
                assert status == 200, where
            elif not isinstance(who, Role):
                assert status == 401, where
            elif who in audience.value:
                assert status not in (401, 403, 405), where
            else:
                assert status == 403, where


def test_events_are_for_watchers(keyed: Keyed) -> None:
    for role, status in [(None, 401), (Role.CLIENT, 403), (Role.METRICS, 200), (Role.ADMIN, 200)]:
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
        assert "a key of role admin or metrics, and yours is of role client" in error["message"]
        message = client.delete("/models/base").json()["error"]["message"]
        assert "a key of role admin, and yours is of role client" in message


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
        "/docs", "/redoc", "/UI", "//ui", "/ui/../models", "/ui%2f..%2fmodels", "/analysis/x",
        "/v2/models",
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


def decided(router: list[Route], method: str, path: str) -> Audience:
    """Returns the audience of what the router itself would run, or the strictest of what fits."""
    scope = {"type": "http", "method": method, "path": path}
    found = [(route, route.matches(scope)[0]) for route in router]
    for route, match in found:
        if match is Match.FULL:
            return AUDIENCES[route.path][method]
    near = {
        a
        for route, match in found
        if match is Match.PARTIAL
        for a in AUDIENCES[route.path].values()
    }
    order = (Audience.OPERATORS, Audience.WATCHERS, Audience.CLIENTS, Audience.VISITORS)
    return next((a for a in order if a in near), Audience.ANYONE if near else Audience.OPERATORS)


@pytest.fixture(scope="module")
def router(keyed: Keyed) -> list[Route]:
    """The routes in the order in which they are tried."""
    found, left = list[Route](), list(create_app(keyed.live.services).routes)
    while left:
        route = left.pop(0)
        if (included := getattr(route, "original_router", None)) is not None:
            left[:0] = included.routes
        else:
            assert isinstance(route, Route)
            found.append(route)
    return found


@given(method=st.sampled_from(_METHODS), path=_PATHS)
@example(method="GET", path="/v1/models/../../models")
@example(method="DELETE", path="/models/jobs")
@example(method="PATCH", path="/models/events")
@example(method="POST", path="/models/jobs/x/cancel")
@example(method="GET", path="/models/jobs/x/cancel")
@example(method="POST", path="/ui/session")
@settings(max_examples=500)
def test_a_requests_audience_is_that_of_the_route_that_would_run(
    router: list[Route], method: str, path: str
) -> None:
    assert audience_of(method, path) is decided(router, method, path)


def test_a_methods_own_audience_decides_and_an_unknown_one_needs_the_strictest() -> None:
    assert audience_of("GET", "/v1/models/a/b") is Audience.CLIENTS
    assert audience_of("DELETE", "/v1/models/a/b") is Audience.OPERATORS
    assert audience_of("PUT", "/v1/models/a/b") is Audience.OPERATORS
    assert audience_of("POST", "/health") is Audience.ANYONE
    assert audience_of("OPTIONS", "/v1/chat/completions") is Audience.CLIENTS
    assert audience_of("get", "/models") is Audience.OPERATORS
    assert audience_of("DELETE", "/models/jobs") is Audience.OPERATORS  # a model of that name
    assert audience_of("POST", "/models/jobs/x/cancel") is Audience.OPERATORS
    assert audience_of("GET", "/models/jobs/x") is Audience.WATCHERS
    assert audience_of("GET", "/analysis/a/b") is Audience.WATCHERS


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
