"""A hub on the loopback interface: real HTTP, real files, and every way of going wrong.

It answers what `huggingface_hub` asks for a listing (`/api/models/ORG/NAME[/revision/REV]`) and for
files (`/ORG/NAME/resolve/COMMIT/FILE`); a second one can stand for the store that large files are
redirected to. Raw sockets where a body has to lie about itself.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 4096  # from here on a file is large: known by its SHA-256
_CHUNK_BYTES = 4096

# What a handler does instead of sending a file: gets the handler, the content and where to begin.
Fault = Callable[["HubHandler", bytes, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that came in."""

    path: str
    headers: Mapping[str, str]  # lower-case names

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass(slots=True)
class Repository:
    """A repository with one commit, and what its listing says of files where that is a lie."""

    files: dict[str, bytes]
    commit: str
    revisions: tuple[str, ...] = ("main",)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)  # file -> entries put over

    def listing(self) -> list[dict[str, Any]]:
        return [self._sibling(name, data) for name, data in sorted(self.files.items())]

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "rfilename": name,
            "size": len(data),
            "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        }
        if len(data) >= LARGE_BYTES:
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
        return {**entry, **self.listed.get(name, {})}


class FakeHub:
    """The hub. `faults` maps a path's ending to what happens, once for each entry of its list.

    Attributes:
        asked: Every request, in order.
        token: What the hub wants to be shown; None: it is open to all.
        store: Where large files are redirected to.
        api_fault: Done instead of every listing.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        self.token: str | None = None
        self.store: str | None = None
        self.api_fault: Fault | None = None
        self.faults: dict[str, list[Fault]] = {}
        self.released = threading.Event()  # lets handlers that wait go on
        self._server = _Server(("127.0.0.1", 0), HubHandler)
        self._server.hub = self  # type: ignore[attr-defined]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo: str, files: Mapping[str, bytes] | Path, *, seed: str = "") -> Repository:
        """Adds a repository, or replaces it by its next commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        digest = hashlib.sha1(repr((repo, seed, sorted(files.items()))).encode())
        self.repositories[repo] = Repository(dict(files), digest.hexdigest())
        return self.repositories[repo]

    def asked_for(self, ending: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path.endswith(ending)]

    def speak_tls(self, certificate: Path, key: Path) -> None:
        """Has the hub show a certificate from now on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeHub]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_request: object) -> None:
        """Clients that leave are what the faults are about."""


class HubHandler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.asked.append(Asked(path=path, headers=headers))
        if hub.token is not None and headers.get("authorization") != f"Bearer {hub.token}":
            self.refuse(401, "RepoNotFound")
        elif path.startswith("/api/models/"):
            self._list(hub, path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._send_file(hub, repo, rest.partition("/")[2])
        else:
            self._send_file(hub, *path.removeprefix("/store/").rsplit("/", 1), stored=True)

    def _list(self, hub: FakeHub, path: str) -> None:
        repo, _, revision = path.partition("/revision/")
        repository = hub.repositories.get(repo)
        if repository is None:
            self.refuse(404, "RepoNotFound")
            return
        if revision not in (repository.commit, *repository.revisions, ""):
            self.refuse(404, "RevisionNotFound")
            return
        record = {"id": repo, "sha": repository.commit, "siblings": repository.listing()}
        body = json.dumps(record).encode()
        if hub.api_fault is not None:
            hub.api_fault(self, body, 0)
            return
        self.start(200, {"content-type": "application/json", "content-length": len(body)})
        self.wfile.write(body)

    def _send_file(self, hub: FakeHub, repo: str, name: str, *, stored: bool = False) -> None:
        repository = hub.repositories.get(repo)
        if repository is None or name not in repository.files:
            self.refuse(404, "EntryNotFound")
            return
        data = repository.files[name]
        if hub.store is not None and not stored and len(data) >= LARGE_BYTES:
            location = f"{hub.store}/store/{repo}/{name}?signature=abc"
            self.start(302, {"location": location, "content-length": 0})
            return
        said = self.headers.get("range")
        begin = int(said.removeprefix("bytes=").partition("-")[0]) if said else 0
        faults = hub.faults.get(name, [])
        if faults:
            faults.pop(0)(self, data, begin)
            return
        self.send(data, begin)

    def send(self, data: bytes, begin: int) -> None:
        """Sends a file as it should be sent."""
        headers: dict[str, object] = {"content-length": len(data) - begin}
        if begin:
            headers["content-range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.start(206 if begin else 200, headers)
        self.wfile.write(data[begin:])

    def start(self, status: int, headers: Mapping[str, object]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def refuse(self, status: int, code: str = "", headers: Mapping[str, object] = {}) -> None:
        coded = {"x-error-code": code} if code else {}
        self.start(status, {"content-length": 0, **coded, **headers})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


# --- faults ---------------------------------------------------------------------------------------


def gzip_bomb(handler: HubHandler, _data: bytes, _begin: int) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    handler.start(200, {"content-encoding": "gzip", "content-length": len(bomb)})
    handler.wfile.write(bomb)


def endless(handler: HubHandler, data: bytes, _begin: int) -> None:
    """A body without a length that goes on for as long as somebody takes it."""
    handler.close_connection = True
    handler.start(200, {"connection": "close"})
    with contextlib.suppress(ConnectionError):
        while True:
            handler.wfile.write(data)


def trickle(handler: HubHandler, data: bytes, begin: int) -> None:
    """A byte now and then until the hub is shut down or the client leaves."""
    handler.close_connection = True
    handler.start(200, {"content-length": len(data)})
    hub: FakeHub = handler.server.hub  # type: ignore[attr-defined]
    with contextlib.suppress(ConnectionError):
        for byte in data[begin:]:
            handler.wfile.write(bytes([byte]))
            if hub.released.wait(0.05):
                return


def trickled_headers(handler: HubHandler, _data: bytes, _begin: int) -> None:
    handler.close_connection = True
    hub: FakeHub = handler.server.hub  # type: ignore[attr-defined]
    with contextlib.suppress(ConnectionError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for byte in b"x-a: " + b"a" * 10_000:
            handler.wfile.write(bytes([byte]))
            if hub.released.wait(0.05):
                return


def other_bytes(handler: HubHandler, data: bytes, begin: int) -> None:
    handler.send(data[:-1] + bytes([data[-1] ^ 1]), begin)


def zeros(handler: HubHandler, data: bytes, begin: int) -> None:
    handler.send(bytes(len(data)), begin)


def status(number: int, headers: Mapping[str, object] | None = None) -> Fault:
    def refuse(handler: HubHandler, _data: bytes, _begin: int) -> None:
        handler.refuse(number, headers=headers or {})

    return refuse


def redirect(location: str) -> Fault:
    def send_away(handler: HubHandler, _data: bytes, _begin: int) -> None:
        handler.start(302, {"location": location, "content-length": 0})

    return send_away


def truncated(num_bytes: int, *, reset: bool = False, announced: bool = True) -> Fault:
    """So many bytes, then the connection ends: closed, or reset."""

    def break_off(handler: HubHandler, data: bytes, begin: int) -> None:
        handler.close_connection = True
        length = {"content-length": len(data) - begin} if announced else {"connection": "close"}
        part = {"content-range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        handler.start(206 if begin else 200, {**length, **part})
        handler.wfile.write(data[begin : begin + num_bytes])
        handler.wfile.flush()
        if reset:
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()

    return break_off


def held_after(num_bytes: int, reached: threading.Event) -> Fault:
    """So many bytes, then nothing more until the hub is shut down."""

    def hold(handler: HubHandler, data: bytes, begin: int) -> None:
        handler.close_connection = True
        handler.start(200, {"content-length": len(data)})
        handler.wfile.write(data[begin : begin + num_bytes])
        handler.wfile.flush()
        reached.set()
        hub: FakeHub = handler.server.hub  # type: ignore[attr-defined]
        hub.released.wait()

    return hold


def without_ranges(handler: HubHandler, data: bytes, _begin: int) -> None:
    """The whole file, whatever was asked for."""
    handler.send(data, 0)


def wrong_range(handler: HubHandler, data: bytes, _begin: int) -> None:
    headers = {"content-range": f"bytes 1-{len(data) - 1}/{len(data)}"}
    handler.start(206, {"content-length": len(data) - 1, **headers})
    handler.wfile.write(data[1:])
