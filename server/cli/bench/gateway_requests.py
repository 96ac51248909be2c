"""The requests of `linker bench gateway`: chats whose answers repeat their prompts' tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from linker_core.errors import LinkerError
from server.cli.bench.gateway_load import Exchange, request_bytes
from server.cli.bench.gateway_servers import MODEL
from server.cli.bench.synthetic import words

KINDS: Final = ("whole", "streamed")
_PATH: Final = "/v1/chat/completions"
_PROMPT_TOKENS: Final = 48
_ANSWER_TOKENS: Final = 16
_NUM_PROMPTS: Final = 16
_DONE: Final = b"data: [DONE]\n\n"


@cache  # making prompts up takes time, and load is made while time is taken
def chat(
    kind: str, number: int, *, max_tokens: int = _ANSWER_TOKENS, steps_per_s: int | None = None
) -> bytes:
    """Returns a chat as it goes over the wire.

    Args:
        kind: One of `KINDS`.
        number: Of the prompt; a few are used again and again.
        max_tokens: Which the answer has.
        steps_per_s: The pace that the stand-in engine keeps; None: as fast as it can; 0: all of the
            answer at once.
    """
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": words(_PROMPT_TOKENS, seed=number)}],
        "max_tokens": max_tokens,
        "temperature": 0.7,
        "ignore_eos": True,
    }
    if steps_per_s is not None:
        body["seed"] = steps_per_s
    if kind == "streamed":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return request_bytes(_PATH, body)


def alternating(number: int) -> bytes:
    """Returns requests of each kind in turn, for which the engine takes no time at all."""
    return chat(KINDS[number % 2], number // 2 % _NUM_PROMPTS, steps_per_s=0)


def streams(num_streams: int, *, max_tokens: int, steps_per_s: int | None = None) -> list[bytes]:
    """Returns requests for streams that run at once."""
    return [
        chat("streamed", number % _NUM_PROMPTS, max_tokens=max_tokens, steps_per_s=steps_per_s)
        for number in range(num_streams)
    ]


def counted_tokens(exchanges: Sequence[Exchange], *, max_tokens: int) -> int:
    """Returns how many tokens came.

    Raises:
        LinkerError: A stream is not as long as was asked for.
    """
    for exchange in exchanges:
        usage, done = exchange.events[-2:]
        counted = json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]
        if counted != max_tokens or done != _DONE:
            raise LinkerError(f"A stream of {max_tokens} tokens ended after {counted}.")
    return max_tokens * len(exchanges)
