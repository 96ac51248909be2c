"""Requests that no honest client sends, and what has to come of them: a refusal, and nothing more.

All of them are answered with 4xx, or break off themselves.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from linker_core.errors import LinkerError
from server.cli.bench.gateway_load import Connection, Exchange, request_bytes
from server.cli.bench.gateway_servers import MODEL

_CHAT: Final = "/v1/chat/completions"
_COMPLETIONS: Final = "/v1/completions"
_AT_ONCE: Final = 8
_MESSAGES: Final = [{"role": "user", "content": "hi"}]


def _chat(**fields: Any) -> bytes:
    return request_bytes(_CHAT, {"model": MODEL, "messages": _MESSAGES, **fields})


def _raw(body: bytes) -> bytes:
    return request_bytes(_CHAT, body)


_REFUSED: Final[Sequence[Callable[[str], bytes]]] = (
    lambda tag: _raw(b"[" * 100_000 + tag.encode()),
    lambda tag: _raw(b'{"model": "' + tag.encode() * 10_000),
    lambda tag: _raw(json.dumps({tag: "x" * 3_000_000}).encode()),
    lambda tag: _raw(b'{"temperature": NaN, "model": "%s"}' % tag.encode()),
    lambda tag: _raw(b'{"user": "%s", "seed": %s}' % (tag.encode(), b"9" * 5_000)),
    lambda tag: _raw(b'{"model": "\\ud800%s"}' % tag.encode()),
    lambda tag: _raw(b"\xff\xfe" + tag.encode()),
    lambda tag: _chat(model=f"no/{tag}"),
    lambda tag: _chat(stop=[tag] * 1_000),
    lambda tag: _chat(n=10**9, user=tag),
    lambda tag: _chat(logit_bias={str(10**9): 1.0}, user=tag),
    lambda tag: _chat(max_tokens=10**12, user=tag),
    lambda tag: _chat(messages=[{"role": tag, "content": "hi"}]),
    lambda tag: _chat(messages=[{"role": "user", "content": f"{tag} " * 100_000}]),
    lambda tag: request_bytes(_COMPLETIONS, {"model": MODEL, "user": tag, "prompt": [10**9]}),
    lambda tag: request_bytes(f"/{tag}/{'x' * 1_000}", b"{}"),
    lambda tag: request_bytes("/v1/models/" + tag, b"", method="DELETE"),
)


async def abuse(port: int, num_requests: int, *, seed: int) -> None:
    """Sends requests that have to be refused, and streams that nobody reads to the end.

    Args:
        port: Of the server.
        num_requests: In all.
        seed: Of what tells this call's requests from others'.

    Raises:
        LinkerError: One was answered with anything but 4xx.
    """
    drawn = random.Random(seed)
    tags = [f"{drawn.getrandbits(64):016x}" for _ in range(num_requests)]
    for first in range(0, num_requests, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, num_requests))
        await asyncio.gather(*(_send(port, number, tags[number]) for number in numbers))


async def _send(port: int, number: int, tag: str) -> None:
    connection = await Connection.open(port)
    try:
        place = number % (len(_REFUSED) + 1)
        if place == len(_REFUSED):
            await _leave(connection)
            return
        request = _REFUSED[place](tag)
        async with asyncio.timeout(60):
            exchange: Exchange = await connection.ask(request)
        # 0: hung up on while the rest of a large body was on its way.
        if exchange.status != 0 and not 400 <= exchange.status < 500:
            raise LinkerError(
                f"{request[:80]!r} was answered with {exchange.status}: "
                f"{bytes(exchange.body[:200])!r}"
            )
    finally:
        connection.close()


async def _leave(connection: Connection) -> None:
    """Asks for a stream and hangs up after its beginning."""
    answered = connection.ask(_chat(stream=True, max_tokens=10_000, seed=50, ignore_eos=True))
    await asyncio.wait({answered}, timeout=0.05)
