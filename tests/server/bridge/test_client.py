from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from linker_core.engine.messages import (
    CancelLoad,
    EngineReady,
    FinishReason,
    LoadFailed,
    LoadModel,
    ModelBytes,
    ModelLoaded,
    ModelUnloaded,
    SamplingParams,
    StepOutput,
    Submit,
    TokenOutput,
    UnloadModel,
)
from linker_core.errors import EngineFailureError, NotReadyError
from server.bridge.client import EngineClient

SAMPLING = SamplingParams(max_tokens=1)
LOADED = ModelLoaded(
    model="chat",
    bytes=ModelBytes(logical=2, unique=1, shared=1),
    max_model_len=8,
    alias_seconds=0.0,
    move_seconds=0.0,
)


async def _submit(**more: object) -> Submit:
    ours, theirs = Pipe()
    client = EngineClient(ours)
    last = TokenOutput(request_id="r", token_id=5, finish_reason=FinishReason.LENGTH)
    try:
        async with aclosing(client.submit("r", "base", (1, 2), SAMPLING, **more)) as tokens:  # type: ignore[arg-type]
            first = asyncio.ensure_future(anext(tokens))
            command = await asyncio.to_thread(theirs.recv)
            theirs.send(StepOutput(tokens=(last,)))
            assert (await first)[0] == [last]
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


def test_submit_says_when_it_was_submitted() -> None:
    before_s = time.monotonic()
    submitted_s = asyncio.run(_submit()).submitted_s
    assert submitted_s is not None
    assert before_s <= submitted_s <= time.monotonic()


def test_token_came_when_the_engine_gave_it_not_when_it_is_read() -> None:
    async def read_late() -> None:
        ours, theirs = Pipe()
        client = EngineClient(ours)
        outputs = [TokenOutput(request_id="r", token_id=number) for number in range(3)]
        try:
            async with aclosing(client.submit("r", "base", (1, 2), SAMPLING)) as batches:
                first = asyncio.ensure_future(anext(batches))
                await asyncio.to_thread(theirs.recv)
                theirs.send(StepOutput(tokens=(outputs[0],)))
                _, (first_s,) = await first
                theirs.send(StepOutput(tokens=(outputs[1],)))
                theirs.send(StepOutput(tokens=(outputs[2],)))
                theirs.send(EngineReady(device="cpu"))
                await client.ready  # so both have come
                read_s = time.monotonic()
                tokens, (second_s, third_s) = await anext(batches)
                assert tokens == outputs[1:]
                assert first_s <= second_s <= third_s <= read_s
        finally:
            theirs.close()
            await client.closed.wait()

    asyncio.run(read_late())


def command(model: str, *, replaces: bool = False) -> LoadModel:
    unread: Any = None
    return LoadModel(
        model=model,
        path="/models/chat",
        identity=unread,
        config=unread,
        plan=unread,
        donor="base",
        max_model_len=None,
        replaces=replaces,
    )


@asynccontextmanager
async def loading(*, replaces: bool) -> AsyncIterator[tuple[asyncio.Future[Any], Connection]]:
    """Yields a load that has been cancelled, and the engine's end, which has heard of it."""
    ours, theirs = Pipe()
    client = EngineClient(ours)
    message = command("chat", replaces=replaces)
    try:
        load = asyncio.ensure_future(client.load(message))
        assert await asyncio.to_thread(theirs.recv) == message
        load.cancel()
        assert await asyncio.to_thread(theirs.recv) == CancelLoad(model="chat")
        yield load, theirs
    finally:
        theirs.close()
        await client.closed.wait()


def test_engine_that_ends_leaves_word_of_what_it_was_loading() -> None:
    async def scenario() -> None:
        ours, theirs = Pipe()
        client = EngineClient(ours)
        loads = [asyncio.ensure_future(client.load(command(name))) for name in ("chat", "code")]
        for _ in loads:
            await asyncio.to_thread(theirs.recv)
        theirs.send(LOADED)
        await loads[0]
        assert client.lost_loads == set()
        theirs.close()
        await client.closed.wait()
        with pytest.raises(EngineFailureError):
            await loads[1]
        assert client.lost_loads == {"code"}

    asyncio.run(scenario())


@pytest.mark.parametrize("replaces", [False, True])
def test_cancelled_load_ends_when_the_engine_has_given_it_up(replaces: bool) -> None:
    async def scenario() -> None:
        async with loading(replaces=replaces) as (load, engine):
            assert not load.done()
            error = NotReadyError("The loading was cancelled.").to_record()
            engine.send(LoadFailed(model="chat", error=error))
            await asyncio.wait([load])
            assert load.cancelled()

    asyncio.run(scenario())


def test_load_that_was_done_before_its_cancellation_is_taken_back() -> None:
    async def scenario() -> None:
        async with loading(replaces=False) as (load, engine):
            engine.send(LOADED)
            assert await asyncio.to_thread(engine.recv) == UnloadModel(model="chat")
            assert not load.done()
            engine.send(ModelUnloaded(model="chat"))
            await asyncio.wait([load])
            assert load.cancelled()

    asyncio.run(scenario())


def test_replacement_that_was_done_before_its_cancellation_counts() -> None:
    async def scenario() -> None:
        async with loading(replaces=True) as (load, engine):
            engine.send(LOADED)
            assert await load == LOADED

    asyncio.run(scenario())


@pytest.mark.parametrize("replaces", [False, True])
def test_cancelled_load_ends_with_the_engine(replaces: bool) -> None:
    async def scenario() -> None:
        async with loading(replaces=replaces) as (load, engine):
            engine.close()
            await asyncio.wait([load])
            assert load.cancelled()

    asyncio.run(scenario())
