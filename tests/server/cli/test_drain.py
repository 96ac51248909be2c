"""SIGTERM under load: whoever got through the door gets an answer."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.server.cli.test_serve import DEADLINE_S, serving
from tests.server.fake_engine import Fault

_SLOW = {"model": "base", "prompt": [Fault.SLOW, 50], "max_tokens": 2, "ignore_eos": True}
_ENOUGH = 40  # answers before the signal


async def _ask(client: httpx.AsyncClient, url: str, *, stream: bool) -> str:
    """Returns how one request ended."""
    body = {**_SLOW, "stream": stream}
    try:
        response = await client.post(f"{url}/v1/completions", json=body)
    except httpx.ConnectError:
        return "refused to connect"  # nothing was promised yet
    if response.status_code == 200:
        ends = "[DONE]\n\n" if stream else "}"
        assert response.text.endswith(ends), response.text[-200:]
        assert '"finish_reason":"length"' in response.text
        return "answered"
    assert response.status_code == 503, response.text
    assert response.headers["Retry-After"]
    return "told to come back"


async def _load(url: str, pid_signal: asyncio.Event, *, number: int) -> Counter[str]:
    """One client that asks again and again until nobody is there; it keeps its connection or not.

    Raises:
        httpx.HTTPError: A request that was sent got no answer.
    """
    ends: Counter[str] = Counter()
    keep = httpx.Limits(max_keepalive_connections=None if number % 2 else 0)
    async with httpx.AsyncClient(timeout=DEADLINE_S, trust_env=False, limits=keep) as client:
        while not ends["refused to connect"]:
            ends[await _ask(client, url, stream=number % 4 < 2)] += 1
            if ends["answered"] * 8 >= _ENOUGH:
                pid_signal.set()
    return ends


async def _drained(url: str, stop: object) -> Counter[str]:
    assert callable(stop)
    enough = asyncio.Event()
    clients = [asyncio.ensure_future(_load(url, enough, number=n)) for n in range(8)]
    await enough.wait()
    stop()
    return sum(await asyncio.gather(*clients), Counter())


def drains(tmp_path: Path, family: Path) -> None:
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        ends = asyncio.run(_drained(served.url, lambda: served.process.send_signal(signal.SIGTERM)))
        assert ends["refused to connect"] == 8
        assert served.ends() == 0
        assert ends["answered"] >= _ENOUGH // 8


@pytest.mark.parametrize("attempt", range(1))
def test_sigterm_under_load_loses_no_request(tmp_path: Path, family: Path, attempt: int) -> None:
    drains(tmp_path / str(attempt), family)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(200))
def test_two_hundred_sigterms_lose_no_request(tmp_path: Path, family: Path, attempt: int) -> None:
    drains(tmp_path / str(attempt), family)
