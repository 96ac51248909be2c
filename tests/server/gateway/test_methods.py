"""Every method on every path: the answer may be anything but a fault of ours."""

from __future__ import annotations

import asyncio

import pytest

from tests.server.gateway.raw_http import statuses
from tests.server.live import LiveServer

_METHODS = (
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "MKCOL",
    "LOCK", "SEARCH", "PURGE", "QUERY",
)  # fmt: skip
_PATHS = (
    "/", "/health", "/ready", "/v1/models", "/v1/models/base", "/v1/models/no%00body",
    "/v1/chat/completions", "/v1/completions", "/models", "/models/jobs", "/models/jobs/x",
    "/analysis", "/analysis/x",
    "/models/plan", "/tokenize", "/tokenizer_info", "/openapi.json", "/m/base/v1/models", "/m/",
    "//health", "/health/", "/%2e%2e/etc/passwd", "/../../etc/passwd", "/v1/models/%ff", "/?a=%",
    "/v1//models", "/HEALTH", "*", "http://localhost/health", "/health?" + "a" * 8000,
)  # fmt: skip


async def _say(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(30):
        writer.write(request)
        received = await reader.read()
    writer.close()
    return received


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_no_method_on_no_path_is_a_fault_of_ours(server: LiveServer, version: str) -> None:
    async def main() -> None:
        port = int(server.url.rsplit(":", 1)[1])
        for path in _PATHS:
            asked = [
                f"{method} {path} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n"
                "Range: bytes=0-18446744073709551615,1-,-1\r\nContent-Length: 2\r\n\r\n{}".encode()
                for method in _METHODS
            ]
            for request, received in zip(
                asked, await asyncio.gather(*(_say(port, one) for one in asked)), strict=True
            ):
                (status,) = statuses(received)
                assert status < 500, request
                assert b"x-request-id: " in received, request

    asyncio.run(main())
