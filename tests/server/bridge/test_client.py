from __future__ import annotations

import asyncio
from contextlib import aclosing
from multiprocessing import Pipe
from typing import Any

import pytest

from linker_core.engine.messages import (
    CancelLoad,
    FinishReason,
    LoadModel,
    SamplingParams,
    StepOutput,
    Submit,
    TokenOutput,
    UnloadModel,
)
from server.bridge.client import EngineClient

SAMPLING = SamplingParams(max_tokens=1)


async def _submit(**more: object) -> Submit:
    ours, theirs = Pipe()
    client = EngineClient(ours)
    last = TokenOutput(request_id="r", token_id=5, finish_reason=FinishReason.LENGTH)
    try:
        async with aclosing(client.submit("r", "base", (1, 2), SAMPLING, **more)) as tokens:  # type: ignore[arg-type]
            first = asyncio.ensure_future(anext(tokens))
            command = await asyncio.to_thread(theirs.recv)
            theirs.send(StepOutput(tokens=(last,)))
            assert await first == last
    finally:
        theirs.close()
        await client.closed.wait()
    assert isinstance(command, Submit)
    return command


def test_submit_carries_priority_and_salt() -> None:
    command = asyncio.run(_submit(priority=-3, cache_salt="tenant"))
    assert (command.priority, command.cache_salt) == (-3, "tenant")


def test_submit_shares_with_everyone_unless_told() -> None:
    command = asyncio.run(_submit())
    assert (command.priority, command.cache_salt) == (0, "")


async def _cancelled_load(*, replaces: bool) -> tuple[object, object]:
    ours, theirs = Pipe()
    client = EngineClient(ours)
    unread: Any = None
    command = LoadModel(
        model="chat",
        path="/models/chat",
        identity=unread,
        config=unread,
        plan=unread,
        donor="base",
        max_model_len=None,
        replaces=replaces,
    )
    try:
        loading = asyncio.ensure_future(client.load(command))
        sent = await asyncio.to_thread(theirs.recv)
        loading.cancel()
        withdrawn = await asyncio.to_thread(theirs.recv)
        await asyncio.wait([loading])
        assert loading.cancelled()
    finally:
        theirs.close()
        await client.closed.wait()
    return sent, withdrawn


@pytest.mark.parametrize("replaces", [False, True])
def test_cancelled_load_takes_back_what_arrives_and_not_what_serves(replaces: bool) -> None:
    sent, withdrawn = asyncio.run(_cancelled_load(replaces=replaces))
    assert isinstance(sent, LoadModel)
    assert withdrawn == (CancelLoad if replaces else UnloadModel)(model="chat")
