from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.gateway.errors import REJECTION_REASONS
from server.gateway.hosts import HostGuard, is_loopback
from server.metrics.serving import ServingMetrics


def status_of(
    *hosts: str,
    bound: str = "127.0.0.1",
    allowed: tuple[str, ...] = (),
    version: str = "1.1",
    origin: str | None = None,
) -> int:
    """Returns what a request with these Host headers is answered; 200 where it gets through."""
    statuses: list[int] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    metrics = ServingMetrics(CollectorRegistry(), rejection_reasons=REJECTION_REASONS)
    guard = HostGuard(app, bound=bound, allowed=allowed, metrics=metrics)
    scope = {
        "type": "http",
        "http_version": version,
        "headers": [
            *((b"host", host.encode("latin-1")) for host in hosts),
            *([] if origin is None else [(b"origin", origin.encode())]),
        ],
    }
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    [status] = statuses
    return status


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.8.9.1",
        "[::1]",
        "[::1]:8000",
    ],
)
def test_loopback_server_answers_to_its_own_names(host: str) -> None:
    assert status_of(host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io",
        "127.0.0.1.", "10.0.0.7", "0.0.0.0", "[::]", "[::ffff:10.0.0.7]", "[fe80::1]", "2130706433",
    ],
)  # fmt: skip
def test_loopback_server_refuses_other_names_ollama_cve_2024_28224(host: str) -> None:
    assert status_of(host) == 403


@pytest.mark.parametrize(
    "hosts",
    [
        (), ("localhost", "localhost"), ("localhost", "evil.example"), ("",), ("localhost:",),
        ("localhost:999999",), ("localhost/",), ("user@localhost",), ("localhost evil.example",),
        ("localhost,evil.example",), ("[::1",), ("localhost\x00",), ("löcalhost",), (":80",),
        ("a" * 254,),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_what_could_be_read_two_ways_is_refused_wherever_the_server_listens(
    hosts: tuple[str, ...], bound: str
) -> None:
    assert status_of(*hosts, bound=bound) == 400


def test_http_1_0_needs_no_name() -> None:
    assert status_of(version="1.0") == 200


def test_server_beyond_the_loopback_answers_to_any_name_unless_some_are_named() -> None:
    assert status_of("models.example", bound="0.0.0.0") == 200
    allowed = ("Models.example", "[fd00::7]")
    for host, status in [
        ("models.EXAMPLE:443", 200), ("[fd00::7]:8000", 200), ("localhost", 200),
        ("other.example", 403), ("models.example.evil", 403),
    ]:  # fmt: skip
        assert status_of(host, bound="0.0.0.0", allowed=allowed) == status
        assert status_of(host, bound="::1", allowed=allowed) == status


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("127.0.0.1", True), ("::1", True), ("127.1.2.3", True),
        ("0.0.0.0", False), ("::", False), ("example.com", False), ("192.168.0.1", False),
        ("localhost.localdomain", False), ("", False),
    ],
)  # fmt: skip
def test_loopback_is_this_machine_and_nobody_beyond_it(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200), ("http://127.0.0.1", 200), ("http://[::1]:8000", 200),
        ("https://chat.example", 200), ("http://evil.example", 403), ("null", 403), ("", 403),
        ("http://localhost.evil.example", 403), ("http://localhost@evil.example", 403),
        ("file://", 403), ("http://evil.example://localhost", 403), ("localhost", 403),
        ("app://.", 200), ("tauri://localhost", 200), ("vscode-webview://0a1b2c", 200),
        ("http://app://x", 403), ("app://x, http://evil.example", 403), ("happ://x", 403),
        ("app://x\nhttp://evil.example", 403), ("chrome-extension://abc", 403), ("app:", 403),
    ],
)  # fmt: skip
def test_page_of_another_site_is_refused_ray_cve_2025_62593(origin: str, status: int) -> None:
    assert status_of("localhost", allowed=("chat.example",), origin=origin) == status


def test_server_of_any_name_takes_pages_of_any_site() -> None:
    assert status_of("here.example", bound="0.0.0.0", origin="http://evil.example") == 200
