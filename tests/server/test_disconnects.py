"""Clients that leave at every moment of a request: nothing of theirs stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_engine import FAKE_ENGINE, Fault
from tests.server.live import LiveServer, live_server

_AT_ONCE = 20
_OWN_TASKS = 10
MOMENTS = ("head", "body", "at once", "soon", "first byte", "some tokens", "whole")


@pytest.fixture(params=["fake", "real"])
def live(
    request: pytest.FixtureRequest, family: Path, tmp_path: Path
) -> Iterator[tuple[LiveServer, list[int]]]:
    """A server with room for two sequences at once, and a prompt whose answer takes its time."""
    is_real = request.param == "real"
    with live_server(
        tmp_path,
        models={"base": family / "base"},
        engine_command=None if is_real else FAKE_ENGINE,
        settings={"engine": {"max_num_seqs": 2, "max_batch_tokens": 32}},
    ) as server:
        server.until_ready()
        yield server, [50] * 100 if is_real else [Fault.WAIT, 50]


def _request(prompt: list[int], *, stream: bool) -> bytes:
    body = {"model": "base", "prompt": prompt, "max_tokens": 90, "ignore_eos": True}
    data = json.dumps({**body, "n": 2, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + b"\r\n" + data


async def _leave(port: int, prompt: list[int], moment: str, chance: random.Random) -> None:
    """One client: it sends what it sends by that moment, and goes, politely or not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = _request(prompt, stream=moment in ("first byte", "some tokens"))
    parts = {"head": 20, "body": request.index(b"\r\n\r\n") + 10}
    writer.write(request[: parts.get(moment)])
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        if moment in ("soon", "whole"):
            await asyncio.sleep(chance.random() * 0.2)
        elif moment == "first byte":
            await reader.readuntil(b"data: ")
        elif moment == "some tokens":
            await reader.read(chance.randrange(1, 4000))
    if chance.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def _all_leave(port: int, prompt: list[int], num_clients: int) -> None:
    chance, doors = random.Random(7), asyncio.Semaphore(_AT_ONCE)

    async def leave(number: int) -> None:
        async with doors:
            await _leave(port, prompt, MOMENTS[number % len(MOMENTS)], chance)

    await asyncio.gather(*(leave(number) for number in range(num_clients)))


def _held(live: LiveServer) -> dict[str, Any]:
    """What the server holds for clients; the tasks of the loop are in the answer."""
    client = live.services.engine.client

    async def num_tasks() -> int:
        return len(asyncio.all_tasks())

    snapshot = client.snapshot
    assert snapshot is not None
    return {
        "mailboxes": len(client._mailboxes),
        "inflight": live.services.gate._inflight.taken,
        "sequences": sum(load.running + load.waiting for load in snapshot.load.values()),
        "leases": dict(+live.services.catalog._leases),
        "tasks": live.call(num_tasks()),
    }


def _is_idle(held: dict[str, Any], num_tasks: int) -> bool:
    """Whether nothing is held; of tasks the server has some of its own, that come and go."""
    return held.pop("tasks") < num_tasks + _OWN_TASKS and not any(held.values())


def everything_is_as_before(
    live: LiveServer, prompt: list[int], num_clients: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert live.complete("base", [50], max_tokens=2).status_code == 200
    live.client.close()
    num_tasks = _held(live)["tasks"]
    asyncio.run(_all_leave(int(live.url.rsplit(":", 1)[1]), prompt, num_clients))
    live.until(lambda: _is_idle(_held(live), num_tasks))
    assert "Traceback" not in caplog.text
    assert "Exception in ASGI" not in caplog.text


def test_two_hundred_disconnects_leave_nothing(
    live: tuple[LiveServer, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    everything_is_as_before(*live, 200, caplog)


@pytest.mark.slow
def test_ten_thousand_disconnects_leave_nothing(
    live: tuple[LiveServer, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    everything_is_as_before(*live, 10_000, caplog)
