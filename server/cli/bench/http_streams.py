"""Streams of completions over HTTP, timed where a user would see them. Knows no engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from linker_core.errors import LinkerError
from server.cli.bench.figures import Round

_TIMEOUT_S: Final = 900
_DATA: Final = "data:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One request for a streamed completion.

    Attributes:
        url: Of the server.
        model: By its name there.
        prompt: As text.
        max_tokens: Which the answer shall have.
        extra: Fields that only this server takes.
    """

    url: str
    model: str
    prompt: str
    max_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)


def complete(requests: Sequence[Completion]) -> Round:
    """Sends all requests at once and reads their answers to the end.

    Raises:
        LinkerError: One was refused, broke off, or gave another number of tokens.
    """
    return asyncio.run(_complete(requests))


async def _complete(requests: Sequence[Completion]) -> Round:
    # As many connections as streams; no proxy, nothing kept for later.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=limits, trust_env=False) as client:
        started = time.perf_counter()
        streams = await asyncio.gather(*(_stream(client, each, started) for each in requests))
        seconds = time.perf_counter() - started
    return Round(
        seconds=seconds, streams=streams, num_tokens=sum(each.max_tokens for each in requests)
    )


async def _stream(
    client: httpx.AsyncClient, request: Completion, started: float
) -> Sequence[float]:
    """Returns when text came, in seconds since the start."""
    body = {
        "model": request.model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stream": True,
        **request.extra,
    }
    times: list[float] = []
    num_tokens = 0
    try:
        async with client.stream("POST", f"{request.url}/v1/completions", json=body) as answer:
            if answer.is_error:
                raise LinkerError(f"{request.model}: {(await answer.aread()).decode()[:300]}")
            async for line in answer.aiter_lines():
                if not line.startswith(_DATA) or line.endswith("[DONE]"):
                    continue
                event = json.loads(line.removeprefix(_DATA))
                if any(choice["text"] for choice in event.get("choices", ())):
                    times.append(time.perf_counter() - started)
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    except httpx.HTTPError as error:
        raise LinkerError(f"{request.model}: the answer broke off: {error!r}") from error
    if num_tokens != request.max_tokens:
        raise LinkerError(f"{request.model}: {num_tokens} tokens instead of {request.max_tokens}")
    return times
