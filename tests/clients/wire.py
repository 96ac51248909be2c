"""A client without a library: bytes out, and the pieces in which bytes come back."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_S = 30.0


class Wire:
    """One HTTP/1.1 connection.

    Args:
        url: Of the server.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host = parts.netloc
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), _TIMEOUT_S)
        self._reader = self._socket.makefile("rb")
        self.status = 0
        self.headers: dict[str, str] = {}

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._socket.close()

    def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Sends a request, POST where there is a body, and reads the head of the response."""
        content = b"" if body is None else json.dumps(body).encode()
        sent = {"Host": self._host, "Content-Length": str(len(content)), **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in sent.items()]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + content)
        self.status = int(self._reader.readline().split()[1])
        self.headers = {}
        while line := self._reader.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.lower()] = value.strip()

    def writes(self) -> Iterator[bytes]:
        """Yields the pieces in which the server wrote a chunked body."""
        assert self.headers["transfer-encoding"] == "chunked"
        while size := int(self._reader.readline(), 16):
            yield self._reader.read(size)
            assert self._reader.readline() == b"\r\n"
        assert self._reader.readline() == b"\r\n"

    def json(self) -> Any:
        """Reads a body whose length is known."""
        return json.loads(self._reader.read(int(self.headers["content-length"])))
