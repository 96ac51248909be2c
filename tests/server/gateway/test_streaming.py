"""Streams that break or are not read, and failures among several sequences."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message

from server.bridge.supervisor import SupervisionLimits
from server.gateway.streaming import DONE, EventStream
from server.metrics.serving import ServingMetrics
from tests.server.fake_engine import MAX_MODEL_LEN
from tests.server.live import DEADLINE_S, LiveServer, live_server

PIECE = b'data: {"piece":1}\n\n'


class SurpriseError(Exception):
    """A fault that nobody foresaw."""


def metrics() -> ServingMetrics:
    return ServingMetrics(CollectorRegistry(), rejection_reasons=("engine_failure",))


async def run_stream(events: AsyncGenerator[bytes, None], send: Callable[[Message], Any]) -> None:
    """Calls the response as a server would; the client stays."""

    async def receive() -> Message:
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async with asyncio.timeout(30):
        await EventStream(events, metrics=metrics())({"type": "http"}, receive, send)


def collected(events: AsyncGenerator[bytes, None]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(run_stream(events, send))
    return sent


def test_surprise_after_the_first_byte_is_told_and_ends_the_stream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield PIECE
        raise SurpriseError("inside")

    sent = collected(events())
    body = b"".join(message.get("body", b"") for message in sent)
    first, told, done, rest = body.decode().split("\n\n")
    assert (first, done, rest) == (PIECE.decode().strip(), DONE.decode().strip(), "")
    error = json.loads(told.removeprefix("data: "))["error"]
    assert error["code"] == "internal_error"
    assert "inside" not in told
    assert "SurpriseError" not in told
    assert sent[-1]["more_body"] is False
    assert "inside" in caplog.text


def test_surprise_before_the_first_byte_is_left_to_the_application() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        raise SurpriseError("inside")
        yield PIECE

    with pytest.raises(SurpriseError):
        collected(events())


@pytest.fixture
def narrow(tmp_path: Path, family: Path) -> Iterator[LiveServer]:
    """A server with two places."""
    http = {"max_inflight": 2}
    with live_server(tmp_path, models={"base": family / "base"}, settings={"http": http}) as live:
        live.until_ready()
        yield live


@pytest.mark.parametrize("stream", [False, True])
def test_surprise_in_one_of_several_sequences_is_500_and_frees_their_places(
    narrow: LiveServer, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    def surprise(*_arguments: object) -> None:
        raise SurpriseError("inside")

    with monkeypatch.context() as patch:
        patch.setattr("server.gateway.generation._advance", surprise)
        response = narrow.chat("base", n=2, stream=stream)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "inside" not in response.text
    assert narrow.chat("base", n=2).status_code == 200
    failed = 'linker_request_success_total{finished_reason="error",model="base"}'
    assert narrow.metric(failed) >= 1


def test_client_that_takes_nothing_loses_its_stream_and_its_places(
    tmp_path: Path, family: Path
) -> None:
    # All 256 places; their answers are some ten megabytes, more than the buffers between take.
    request = {"model": "base", "prompt": ["a"] * 128, "n": 2, "max_tokens": MAX_MODEL_LEN - 1}
    body = json.dumps({**request, "stream": True, "logprobs": 1}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    http = {"max_inflight": 256, "send_timeout_s": 0.5}
    with (
        live_server(tmp_path, models={"base": family / "base"}, settings={"http": http}) as live,
        socket.socket() as client,
    ):
        live.until_ready()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.connect(("127.0.0.1", int(live.url.rsplit(":", 1)[1])))
        client.sendall(head.encode() + body)
        aborted = 'linker_request_success_total{finished_reason="abort",model="base"}'
        live.until(lambda: live.metric(aborted) > 0)
        assert live.chat("base", n=2).status_code == 200
        client.settimeout(DEADLINE_S)
        assert b"[DONE]" not in read_to_the_end(client)


def read_to_the_end(client: socket.socket) -> bytes:
    """Reads what is under way until the connection ends, as it must, in order or not."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            received += chunk
    return received


def test_more_sequences_than_there_are_places_is_400(narrow: LiveServer) -> None:
    response = narrow.chat("base", n=3)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request_error"
    assert narrow.complete("base", ["a", "b"], n=2).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_stopped_engine_gets_no_new_requests(tmp_path: Path, family: Path, *, stream: bool) -> None:
    limits = SupervisionLimits(poll_s=0.02, stall_s=0.2, stall_kill_s=3600.0)
    with live_server(tmp_path, models={"base": family / "base"}, limits=limits) as live:
        live.until_ready()
        pid = live.services.engine.pid
        assert pid is not None
        engine = psutil.Process(pid)
        engine.suspend()
        live.until(lambda: live.client.get("/ready").status_code == 503)
        response = live.chat("base", stream=stream)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "not_ready"
        assert response.headers["Retry-After"]
        engine.resume()
        live.until_ready()
        assert live.chat("base", stream=stream).status_code == 200
