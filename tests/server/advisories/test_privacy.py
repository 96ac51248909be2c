"""Rows E5-E7: what others could learn from time, from logs, from metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from linker_core.engine import prefix
from server.registry.records import Role
from tests.server.advisories.attacks import refused
from tests.server.cli.test_serve import Served, serving
from tests.server.fake_engine import Fault
from tests.server.keyed import client_of, give_key
from tests.server.live import LiveServer, live_server

CHAT = "/v1/chat/completions"
CANARY = "canary-7f3a9c51"
LONG = "Once upon a time there was a secret that nobody but its owner was to know of. "


class Tenants(NamedTuple):
    """A server on the real engine that two tenants use."""

    live: LiveServer
    one: httpx.Client
    other: httpx.Client


@pytest.fixture(scope="module")
def tenants(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    state = tmp_path_factory.mktemp("tenants")
    admin = give_key(state, Role.ADMIN).key
    keys = [give_key(state, Role.CLIENT).key for _ in range(2)]
    with live_server(
        state,
        models={"base": root / "base", "near": root / "near"},
        root=root,
        engine_command=None,
        settings={"sharing": {"policy": "exact"}, "engine": {"kv_cache_tokens": 1024}},
    ) as live:
        live.client.headers["Authorization"] = f"Bearer {admin}"
        live.until_ready()
        with client_of(live, keys[0]) as one, client_of(live, keys[1]) as other:
            yield Tenants(live, one, other)


def cached(client: httpx.Client, text: str, **more: Any) -> int:
    """Returns how many of a prompt's tokens somebody had left in the cache."""
    body = {"model": "base", "prompt": text, "max_tokens": 1, **more}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    number = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert isinstance(number, int)
    return number


def test_cve_2025_46570_prefix_of_another_tenant_is_not_found(tenants: Tenants) -> None:
    assert cached(tenants.one, LONG) == 0
    assert cached(tenants.one, LONG) >= 16  # its own is
    assert cached(tenants.other, LONG) == 0
    assert cached(tenants.other, LONG, cache_salt="guess") == 0


def test_cve_2025_46570_prefix_of_another_variant_is_not_found(tenants: Tenants) -> None:
    text = LONG[::-1]
    assert cached(tenants.one, text) == 0
    assert cached(tenants.one, text, model="near") == 0
    assert cached(tenants.one, text, model="near") >= 16


def test_cve_2026_105756_salt_does_not_reach_another_tenant(tenants: Tenants) -> None:
    for salt in ("a", "a\n", "x" * 257, "", "\x00"):
        response = tenants.one.post(
            "/v1/completions", json={"model": "base", "prompt": "a", "cache_salt": salt}
        )
        assert (response.status_code == 200) == (salt == "a")
    text = f"{LONG} salted"
    assert cached(tenants.one, text, cache_salt="mine") == 0
    assert cached(tenants.one, text, cache_salt="mine") >= 16
    assert cached(tenants.other, text, cache_salt="mine") == 0
    assert cached(tenants.one, text, cache_salt="yours") == 0


def test_cve_2025_25183_keys_of_prefixes_cannot_be_made_to_collide() -> None:
    """What Python hashes alike, or joins to the same text, has keys of its own here."""
    roots = {
        prefix.key_root(plan_fingerprint=plan, slot=slot, salt=salt)
        for plan in ("", "a", "ab", "a\0", "\0")
        for slot in (0, 1, 2**61 - 1)  # which Python hashes like 0
        for salt in ("", "a", "b", "ba", "\0")
    }
    assert len(roots) == 5 * 3 * 5
    pages = {
        prefix.PageKeys(root).first(1, tokens, 2)[0]
        for root in roots
        for tokens in ([0, 1], [1, 0], [0, 2**31 - 1], [256, 0], [1, 256])
    }
    assert len(pages) == len(roots) * 5
    assert {len(key) for key in pages} == {32}


class Watched(NamedTuple):
    """`linker serve` with keys, every word of which is kept."""

    served: Served
    admin: httpx.Client
    client: httpx.Client
    state: Path


@pytest.fixture(scope="module")
def watched(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    place = tmp_path_factory.mktemp("watched")
    admin, key = (give_key(place / "s", role).key for role in (Role.ADMIN, Role.CLIENT))
    with serving(place, "--model", f"base={root / 'base'}", f"near={root / 'near'}") as served:
        served.until("/ready", lambda response: response.status_code == 200)
        with client_at(served.url, admin) as operator, client_at(served.url, key) as client:
            yield Watched(served, operator, client, place / "s")


def client_at(url: str, key: str | None) -> httpx.Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)


def key_of(client: httpx.Client) -> str:
    return client.headers["Authorization"].removeprefix("Bearer ")


def written(watched: Watched, capfd: pytest.CaptureFixture[str]) -> str:
    """Returns all that the server has written down, or tells those who may ask."""
    files = [path for path in watched.state.rglob("*") if path.is_file()]
    stored = "".join(path.read_bytes().decode("latin-1") for path in files)
    told = "".join(
        watched.admin.get(path).text
        for path in ("/health", "/ready", "/version", "/metrics", "/models", "/models/jobs")
    )
    return "".join((stored, told, *watched.served.log, *capfd.readouterr()))


BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": CANARY}]},
    {"messages": [{"role": "user", "content": CANARY}], "stream": True},
    {"messages": [{"role": CANARY, "content": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": CANARY}]}]},
    {"messages": [{"role": "user", "content": "a"}], "temperature": CANARY},
    {"messages": [{"role": "user", "content": "a"}], "stop": [CANARY]},
    {"messages": [{"role": "user", "content": "a"}], "user": CANARY, "cache_salt": CANARY},
    {"messages": [{"role": "user", "content": "a"}], "unknown": CANARY},
    {"messages": [{"role": "user", "content": "a"}], "structured_outputs": {"regex": f"({CANARY}"}},
    {"messages": [{"role": "user", "content": "a"}], "metadata": {"a": CANARY}},
    {"messages": [{"role": "user", "content": CANARY * 5000}]},
    {"model": CANARY, "messages": []},
]


def test_secrets_of_requests_are_written_nowhere(
    watched: Watched, capfd: pytest.CaptureFixture[str]
) -> None:
    for body in BODIES:
        watched.client.post(CHAT, json={"model": "base", **body})
    watched.client.post(CHAT, content=f'{{"model": "{CANARY}')
    watched.client.get(f"/{CANARY}?key={CANARY}", headers={"X-Request-Id": CANARY, "X": CANARY})
    watched.client.post("/v1/completions", json={"model": "base", "prompt": [Fault.FAIL, 5]})
    said = written(watched, capfd)
    assert CANARY not in said
    assert "listening on" in said  # the search sees what is there


@pytest.mark.parametrize("advisory", ["CVE-2024-9606", "CVE-2025-11203", "CVE-2026-108857"])
def test_key_is_written_nowhere(
    watched: Watched, advisory: str, capfd: pytest.CaptureFixture[str]
) -> None:
    good, url = key_of(watched.client), watched.served.url
    secret, answers = good[20:], ""
    if advisory == "CVE-2024-9606":  # a key that is masked, but too little of it
        with client_at(url, f"{good}x") as wrong:
            answers += refused(wrong.get("/v1/models"), 401)
            answers += refused(wrong.post(CHAT, json={}), 401)
    elif advisory == "CVE-2025-11203":  # health that tells how the server is set up
        for path in ("/health", "/ready"):
            answers += httpx.get(url + path, trust_env=False).text
    else:  # a key in a place where it does not belong
        watched.client.post(f"{CHAT}?api_key={good}", json={"model": good})
        answers += refused(httpx.get(f"{url}/v1/models?key={good}", trust_env=False), 401)
    said = written(watched, capfd)
    for key in (good, key_of(watched.admin)):
        assert key[20:] not in said
    assert secret not in answers


@pytest.mark.parametrize(
    ("advisory", "content"),
    [
        ("CVE-2026-22778", [{"type": "image_url", "image_url": {"url": "data:image/png,AA"}}]),
        ("CVE-2026-54236", [{"type": "input_audio", "input_audio": {"data": "AA"}}]),
        ("sibling", [{"type": "text", "text": {"a": [None]}}]),
    ],
)
def test_error_holds_no_address_and_no_object(
    target: LiveServer, advisory: str, content: list[dict[str, Any]]
) -> None:
    del advisory
    body = {"model": "base", "messages": [{"role": "user", "content": content}]}
    for stream in (False, True):
        message = refused(target.client.post(CHAT, json={**body, "stream": stream}), 400)
        assert " at 0x" not in message
        assert "<" not in message


def series(server: LiveServer) -> set[str]:
    """Returns the names and labels of all that is exposed."""
    lines = server.client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if line and line[0] != "#"}


@pytest.mark.parametrize("advisory", ["CVE-2022-21698", "PYSEC-2026-4361"])
def test_series_do_not_grow(target: LiveServer, advisory: str) -> None:
    def attack(number: int) -> None:
        odd = f"x{number}"
        if advisory == "CVE-2022-21698":
            target.client.request(f"X{number}", f"/v1/models/{odd}")
            target.client.request("GET", f"/{odd}", headers={"X-Request-Id": odd})
        else:
            target.chat(odd)
            target.chat("base", user=odd, max_tokens=1)
            target.client.post("/models/load", json={"model": odd})
            target.client.get(f"/models/jobs/{odd}")

    attack(0)
    before = series(target)
    for number in range(1, 60):
        attack(number)
    assert series(target) == before
