"""GET /ui: the page's files, and whose key it has."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from server.registry.records import Role
from server.ui.assets import asset_files
from tests.server.keyed import client_of, give_key
from tests.server.live import DEADLINE_S, LiveServer, live_server

_FILES = sorted(asset_files())
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PLAIN = {"Accept-Encoding": "identity"}


def path_of(name: str) -> str:
    return "/ui" if name == "index.html" else f"/ui/{name}"


def policy_of(response: httpx.Response) -> dict[str, list[str]]:
    """Returns the directives of a response's policy of contents."""
    directives = response.headers["content-security-policy"].split(";")
    return {name: values for name, *values in map(str.split, directives)}


def test_root_leads_to_the_page(server: LiveServer) -> None:
    response = server.client.get("/")
    assert (response.status_code, response.headers["location"]) == (307, "/ui")
    assert server.client.head("/").headers["location"] == "/ui"


@pytest.mark.parametrize("name", _FILES)
def test_every_file_is_sent_as_it_is_and_compressed(server: LiveServer, name: str) -> None:
    body = asset_files()[name].read_bytes()
    plain = server.client.get(path_of(name), headers=PLAIN)
    assert (plain.status_code, plain.content) == (200, body)
    assert plain.headers["content-type"] == _TYPES[Path(name).suffix]
    assert "content-encoding" not in plain.headers
    with server.client.stream("GET", path_of(name), headers={"Accept-Encoding": "gzip"}) as packed:
        received = b"".join(packed.iter_raw())
        assert packed.headers["content-encoding"] == "gzip"
        assert int(packed.headers["content-length"]) == len(received)
    assert gzip.decompress(received) == body
    assert packed.headers["etag"] == plain.headers["etag"]
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
    head = server.client.head(path_of(name), headers=PLAIN)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(body))
    assert head.headers["etag"] == plain.headers["etag"]


def test_file_that_a_browser_has_is_not_sent_again(server: LiveServer) -> None:
    first = server.client.get("/ui")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for said in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
        again = server.client.get("/ui", headers={"If-None-Match": said})
        assert (again.status_code, again.content) == (304, b""), said
        assert again.headers["etag"] == tag
        assert "content-security-policy" in again.headers
    other = server.client.get("/ui", headers={"If-None-Match": 'W/"other"'})
    assert other.content == first.content


@pytest.mark.parametrize(
    ("said", "packed"),
    [
        ("gzip", True), ("br, gzip;q=0.5", True), ("GZIP", True), ("*", True), ("gzip; q=1", True),
        ("", False), ("br", False), ("gzip;q=0", False), ("gzip; q=0.000, *", False),
        ("identity, *;q=0", False), ("xgzip", False),
    ],
)  # fmt: skip
def test_file_is_compressed_for_those_who_say_so(
    server: LiveServer, said: str, packed: bool
) -> None:
    response = server.client.get("/ui", headers={"Accept-Encoding": said})
    assert (response.headers.get("content-encoding") == "gzip") is packed
    assert response.content == asset_files()["index.html"].read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "nothing.js", "assets.py", "../assets.py", "%2e%2e/assets.py", "..%2fassets.py", "page",
        "page/app.js", "/etc/passwd", "%2fetc%2fpasswd", "index.html%00", "INDEX.HTML", "", ".",
        "index.html/", "C:\\app.js", "app.js%0a",
    ],
)  # fmt: skip
def test_no_other_name_is_a_file(server: LiveServer, name: str) -> None:
    address = server.url.removeprefix("http://")
    with contextlib.closing(HTTPConnection(address, timeout=DEADLINE_S)) as connection:
        connection.request("GET", f"/ui/{name}")  # as it is, where httpx would tidy it up
        response = connection.getresponse()
        assert response.status == 404
        assert json.load(response)["error"]["code"] == "not_found"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_files_are_read_only(server: LiveServer, method: str) -> None:
    for path in ("/", "/ui", "/ui/index.html"):
        response = server.client.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")


def test_page_may_load_nothing_from_elsewhere(server: LiveServer) -> None:
    for name in _FILES:
        response = server.client.head(path_of(name))
        policy = policy_of(response)
        assert policy.pop("default-src") == ["'none'"]
        assert policy.pop("frame-ancestors") == ["'none'"]
        assert policy.pop("base-uri") == policy.pop("form-action") == ["'none'"]
        for kind in ("script-src", "style-src", "connect-src"):
            assert policy.pop(kind) == ["'self'"]
        assert policy.pop("img-src") == ["'self'", "data:"]
        assert not policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cross-origin-opener-policy"] == "same-origin"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"


def test_whatever_the_page_names_is_one_of_its_files(server: LiveServer) -> None:
    markup = server.client.get("/ui").text
    for name in re.findall(r'(?:src|href)="([^"#]+)"', markup):
        assert server.client.get(name).status_code == 200, name
    for name in _FILES:
        if Path(name).suffix != ".js" or name == "plotly.min.js":
            continue
        script = server.client.get(path_of(name)).text
        for other in re.findall(r'^import [^;]*?"([^"]+)";', script, re.MULTILINE | re.DOTALL):
            assert other.removeprefix("./") in _FILES, f"{name} imports {other}"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, dict[Role, str]]]:
    state = tmp_path_factory.mktemp("keys")
    made = {role: give_key(state, role).key for role in Role}
    with live_server(state) as live:
        yield live, made


def test_session_says_what_a_key_is_good_for(
    server: LiveServer, keys: tuple[LiveServer, dict[Role, str]]
) -> None:
    version = server.client.get("/version").json()["version"]
    everybody = {"role": "admin", "keys_required": False, "version": version}
    assert server.client.get("/ui/session").json() == everybody
    live, made = keys
    for role, key in made.items():
        with client_of(live, key) as client:
            session = client.get("/ui/session").json()
            assert session == {"role": role.value, "keys_required": True, "version": version}
    with client_of(live, None) as client:
        stranger = {"role": "none", "keys_required": True, "version": None}
        assert client.get("/ui/session").json() == stranger


@pytest.mark.parametrize("said", ["Bearer sk-linker-wrong", "Bearer", "Basic YTpi", ""])
def test_session_refuses_what_is_no_good_key(
    keys: tuple[LiveServer, dict[Role, str]], said: str
) -> None:
    with client_of(keys[0], None) as client:
        refused = client.get("/ui/session", headers={"Authorization": said})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_page_needs_no_key_and_shows_nothing_of_who_has_one(
    server: LiveServer, keys: tuple[LiveServer, dict[Role, str]]
) -> None:
    live, made = keys
    for key in (None, "wrong", *made.values()):
        with client_of(live, key) as client:
            for name in _FILES:
                response = client.get(path_of(name))
                assert response.status_code == 200
                assert response.content == server.client.get(path_of(name)).content
