"""Rows D1, D2, D4 and D5: connections that hold, confuse or never end."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.advisories.attacks import Bystander
from tests.server.live import LiveServer, live_server

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY = b'{"model":"base","prompt":"hi","max_tokens":2}'


@pytest.fixture(scope="module")
def hurried(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with little patience and few places."""
    http = {"header_timeout_s": 0.4, "body_timeout_s": 0.6, "idle_timeout_s": 0.5,
            "send_timeout_s": 0.5, "max_connections_per_address": 24}  # fmt: skip
    models = {"base": root / "base", "near": root / "near"}
    state = tmp_path_factory.mktemp("hurried")
    with live_server(state, models=models, root=root, settings={"http": http}) as live:
        live.until_ready()
        yield live


@contextmanager
def connected(server: LiveServer) -> Iterator[socket.socket]:
    port = urlsplit(server.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """Returns what comes until the server hangs up."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionError:
        pass
    return received


def say(server: LiveServer, *pieces: bytes) -> bytes:
    with connected(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return rest(connection)  # until the server has waited long enough for more


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def trickle(server: LiveServer, begin: bytes, rest_of_it: bytes) -> tuple[bytes, int]:
    """Sends a byte now and then until the server hangs up; returns its words and what it took."""
    with connected(server) as connection:
        connection.sendall(begin)
        connection.settimeout(0.05)
        received = b""
        for sent, byte in enumerate(rest_of_it):
            try:
                connection.sendall(bytes((byte,)))
                piece = connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                return received, sent
            if not piece:
                return received, sent
            received += piece
        return received, len(rest_of_it)


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        pytest.param(b"POST /v1/completions HTTP/1.1\r\n", b"X-A: " + b"a" * 400,
                     id="uvicorn-issue-157"),
        pytest.param(HEAD + b"Content-Length: 400\r\n\r\n", b" " * 400, id="xinference-issue-5213"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 80,
                     id="chunked"),
        pytest.param(b"", b"POST " + b"/" * 400, id="line"),
    ],
)  # fmt: skip
def test_request_of_a_byte_now_and_then(hurried: LiveServer, begin: bytes, endless: bytes) -> None:
    others = Bystander(hurried)
    with ThreadPoolExecutor(8) as threads:
        slow = [threads.submit(trickle, hurried, begin, endless) for _ in range(8)]
        said = others.ask()
        assert others.ask() == said
        for attack in slow:
            received, taken = attack.result()
            assert taken < len(endless)
            assert statuses(received) in ([408], [])
    others.check()


def test_one_address_holds_only_so_many_connections(hurried: LiveServer) -> None:
    others = Bystander(hurried)
    port = urlsplit(hurried.url).port
    held = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(60)]
    for connection in held:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
    ended = [rest(connection) for connection in held]
    assert len(ended) == 60
    told = [status for words in ended for status in statuses(words)]
    assert set(told) == {408, 429}
    assert told.count(408) <= 24
    for connection in held:
        connection.close()
    others.check()


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx0\r\n\r\n", id="CVE-2025-43859"),
        pytest.param(
            b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="both"
        ),
        pytest.param(b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}}", id="two-lengths"),
        pytest.param(b"Content-Length: +2\r\n\r\n{}", id="signed"),
        pytest.param(b"Content-Length: 2,2\r\n\r\n{}", id="list"),
        pytest.param(b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", id="xchunked"),
        pytest.param(b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", id="space"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n", id="negative"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", id="hex"),
        pytest.param(b"X: a\nContent-Length: 2\r\n\r\n{}", id="bare-newline"),
        pytest.param(b"X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}", id="folded"),
        pytest.param(b"X\x00: a\r\nContent-Length: 2\r\n\r\n{}", id="nul"),
    ],
)
def test_request_that_two_readers_see_differently(hurried: LiveServer, attack: bytes) -> None:
    """No second request comes out of the first: one answer, none of it a success."""
    smuggled = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    said = statuses(say(hurried, HEAD + attack, smuggled))
    assert said
    assert said[0] == 400
    assert 200 not in said


@pytest.mark.parametrize(
    "header",
    [
        b"bytes=" + b",".join(b"%d-%d" % (n, n + 1) for n in range(0, 20_000, 2)),
        b"bytes=" + b"0-" * 5000,
        b"bytes=-1" + b"," * 10_000,
    ],
    ids=lambda header: f"CVE-2025-62727-{len(header)}",
)
def test_range_that_is_work(target: LiveServer, header: bytes) -> None:
    for path in ("/health", "/openapi.json", "/metrics"):
        response = target.client.get(path, headers={"Range": header.decode()})
        assert response.status_code in (200, 431)
        assert "Content-Range" not in response.headers


def test_cve_2025_54121_large_upload_does_not_stop_the_loop(target: LiveServer) -> None:
    others = Bystander(target)
    said = others.ask()
    part = b"--x\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n" + b"a" * (3 << 20)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}

    def upload(_number: int) -> int:
        pieces = (part[at : at + 65536] for at in range(0, len(part), 65536))
        try:
            return target.client.post("/models", content=pieces, headers=headers).status_code
        except httpx.TransportError:
            return 413  # it hung up before all of it was sent

    with ThreadPoolExecutor(4) as threads:
        uploads = [threads.submit(upload, number) for number in range(8)]
        while not all(done.done() for done in uploads):
            assert others.ask() == said
        assert {done.result() for done in uploads} == {413}


METHODS = ("GET", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PUT", "PATCH", "DELETE", "PROPFIND",
           "X-ODD", "get", "PRI", "SEARCH", "PURGE")  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_triton_boofuzz_method(hurried: LiveServer, method: str) -> None:
    for path in ("/", "*", "/v1/chat/completions", "/models/base", "/v1/models", "/health",
                 "/" + "a" * 9000, "//", "/%00", "/\xff", "http://x/", "127.0.0.1:80"):  # fmt: skip
        line = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        if method == "DELETE" and path == "/models/base":
            continue  # is what it says
        found = statuses(say(hurried, line.encode("latin-1")))
        assert all(status < 500 for status in found), (path, found)


@pytest.mark.parametrize(
    "version", [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9", b"", b"HTTP"]
)
def test_triton_boofuzz_version(hurried: LiveServer, version: bytes) -> None:
    for line in (b"GET /v1/models " + version, b"GET  /v1/models " + version, version):
        found = statuses(say(hurried, line + b"\r\nHost: 127.0.0.1\r\n\r\n"))
        assert all(status < 500 for status in found)


def test_triton_boofuzz_version_of_a_stream(hurried: LiveServer) -> None:
    body = BODY[:-1] + b',"stream":true}'
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(body)
    answer, _, events = say(hurried, head + body).partition(b"\r\n\r\n")
    assert statuses(answer) == [200]
    assert b"transfer-encoding" not in answer
    assert events.startswith(b"data: {")
    assert events.endswith(b"}\n\ndata: [DONE]\n\n")


def test_triton_boofuzz_pipeline(hurried: LiveServer) -> None:
    good = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    assert statuses(say(hurried, good * 5)) == [200] * 5
    mixed = statuses(say(hurried, good + b"\x16\x03\x01\x02\x00" + good))
    assert mixed[0] == 200
    assert all(status < 500 for status in mixed)


def test_clients_that_connect_and_reset(
    target: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, entered = target.peers, list[str]()
    enter, before = peers.enter, len(peers)

    def noting(site: str) -> HTTPStatus | None:
        entered.append(site)
        return enter(site)

    monkeypatch.setattr(peers, "enter", noting)
    for _ in range(200):
        with connected(target) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
    target.until(lambda: len(entered) == 200)
    target.until(lambda: len(peers) <= before)  # none of them is held; see the fixture, too
