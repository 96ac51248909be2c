"""Clients of a soak: they ask, leave midway, and remember what was answered."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.benchmarks.soak_requests import Ask, Asks, Ending, Json


@dataclass(slots=True)
class Choice:
    """What is there of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, record: Json) -> None:
        """Takes a whole choice, or a piece of one."""
        message = record.get("message") or record.get("delta") or {}
        self.text += record.get("text") or message.get("content") or ""
        self.token_ids += record.get("token_ids") or []
        self.finish_reason = record["finish_reason"] or self.finish_reason
        logprobs = record["logprobs"] or {"token_logprobs": []}
        if "content" in logprobs:
            self.logprobs += [entry["logprob"] for entry in logprobs["content"]]
        else:
            self.logprobs += logprobs["token_logprobs"]

    def begins(self, whole: Choice) -> bool:
        """Whether this is how the other one begins."""
        return (
            whole.text.startswith(self.text)
            and whole.token_ids[: len(self.token_ids)] == self.token_ids
            and whole.logprobs[: len(self.logprobs)] == self.logprobs
            and self.finish_reason in (None, whole.finish_reason)
        )


Answer = dict[int, Choice]  # choices by index


@dataclass(slots=True)
class Memory:
    """All that the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    asks: dict[str, Ask] = field(default_factory=dict)
    whole: dict[str, list[Answer]] = field(default_factory=dict)  # different ones, by key
    begun: dict[str, list[Answer]] = field(default_factory=dict)  # of clients that left

    def keep(self, ask: Ask, answer: Answer, *, is_whole: bool) -> None:
        """Remembers an answer that will be compared."""
        self.counts["tokens"] += sum(len(choice.token_ids) for choice in answer.values())
        if not ask.is_repeatable:
            return
        self.counts["greedy" if ask.is_greedy else "seeded"] += 1
        key = right_key(ask)
        self.asks[key] = ask
        known = (self.whole if is_whole else self.begun).setdefault(key, [])
        if answer not in known:
            known.append(answer)


def right_key(ask: Ask) -> str:
    """Returns what the right answer depends on: neither priority nor salt."""
    return Ask(path=ask.path, body=_bare(ask.body)).key


async def visit(client: httpx.AsyncClient, asks: Asks, memory: Memory, *, until_s: float) -> None:
    """Asks again and again until that time of the event loop's clock."""
    clock = asyncio.get_running_loop().time
    while clock() < until_s:
        if asks.is_bad_next():
            await _ask_badly(client, asks.bad(), memory)
        else:
            ask = asks.next()
            memory.counts[ask.ending.value] += 1
            try:
                await _take(client, ask, memory)
            except httpx.HTTPError as error:
                memory.problems.append(f"{type(error).__name__} for a good request: {_short(ask)}")


async def ask_alone(client: httpx.AsyncClient, ask: Ask, *, salt: str) -> Answer:
    """Returns the answer to the same request with nothing running beside it.

    Args:
        client: Of a server that nobody else asks.
        ask: What to ask.
        salt: Not used before, so that nothing is found in the cache.
    """
    body = _bare(ask.body) | {"cache_salt": salt}
    response = await client.post(ask.path, json=body)
    response.raise_for_status()
    return _whole(response.json())


def _bare(body: Json) -> Json:
    return {name: value for name, value in body.items() if name not in ("priority", "cache_salt")}


async def _ask_badly(client: httpx.AsyncClient, ask: Ask, memory: Memory) -> None:
    memory.counts["bad"] += 1
    response = await client.post(ask.path, json=ask.body)
    memory.statuses[response.status_code] += 1
    if response.status_code not in (400, 404):
        memory.problems.append(f"{response.status_code} for a bad request: {_short(ask)}")


async def _take(client: httpx.AsyncClient, ask: Ask, memory: Memory) -> None:
    if ask.ending is Ending.WHOLE:
        response = await client.post(ask.path, json=ask.body)
        if _is_success(response, ask, memory):
            memory.keep(ask, _whole(response.json()), is_whole=True)
    elif ask.ending is Ending.LEAVE_WAITING:
        with suppress(TimeoutError):
            async with asyncio.timeout(ask.patience):
                response = await client.post(ask.path, json=ask.body)
                if _is_success(response, ask, memory):
                    memory.keep(ask, _whole(response.json()), is_whole=True)
    else:
        await _take_stream(client, ask, memory)


async def _take_stream(client: httpx.AsyncClient, ask: Ask, memory: Memory) -> None:
    answer: Answer = {}
    is_whole, num_pieces = False, 0
    async with client.stream("POST", ask.path, json=ask.body | {"stream": True}) as response:
        if not _is_success(response, ask, memory):
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_whole = True
            elif line.startswith("data: "):
                record = json.loads(line.removeprefix("data: "))
                if "error" in record:
                    memory.problems.append(f"a stream broke: {record['error']['message']:.200}")
                    return
                for choice in record["choices"]:
                    answer.setdefault(choice["index"], Choice()).add(choice)
                num_pieces += 1
            if ask.ending is Ending.LEAVE_STREAM and num_pieces >= ask.patience:
                break
    if ask.ending is Ending.STREAM and not is_whole:
        memory.problems.append(f"a stream ended early: {_short(ask)}")
    memory.keep(ask, answer, is_whole=is_whole)


def _is_success(response: httpx.Response, ask: Ask, memory: Memory) -> bool:
    memory.statuses[response.status_code] += 1
    if not response.is_success:
        memory.problems.append(f"{response.status_code} for a good request: {_short(ask)}")
    return response.is_success


def _whole(record: dict[str, Any]) -> Answer:
    answer: Answer = {}
    for choice in record["choices"]:
        answer.setdefault(choice["index"], Choice()).add(choice)
    return answer


def _short(ask: Ask) -> str:
    return json.dumps(ask.body)[:300]
