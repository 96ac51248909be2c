from __future__ import annotations

import asyncio

import pytest

from linker_core.engine.messages import TokenOutput
from linker_core.errors import EngineFailureError
from server.bridge.mailbox import MAX_TAKEN, Mailbox


def token(token_id: int) -> TokenOutput:
    return TokenOutput(request_id="r", token_id=token_id)


async def taken(mailbox: Mailbox) -> list[int]:
    return [each.token_id for each in (await mailbox.take())[0]]


def test_tokens_that_wait_come_together_in_order() -> None:
    async def read() -> list[int]:
        mailbox = Mailbox(limit=4)
        for token_id in (1, 2, 3):
            assert mailbox.put(token(token_id), 0.0)
        return await taken(mailbox)

    assert asyncio.run(read()) == [1, 2, 3]


def test_tokens_keep_when_they_came_however_late_they_are_taken() -> None:
    async def read() -> list[float]:
        mailbox = Mailbox(limit=100)
        for number in range(MAX_TAKEN + 2):
            mailbox.put(token(number), float(number))
        arrivals_s: list[float] = []
        for _ in range(2):
            tokens, came_s = await mailbox.take()
            assert [each.token_id for each in tokens] == came_s
            arrivals_s += came_s
        return arrivals_s

    assert asyncio.run(read()) == list(range(MAX_TAKEN + 2))


def test_full_mailbox_takes_no_more() -> None:
    async def fill() -> list[bool]:
        mailbox = Mailbox(limit=2)
        return [mailbox.put(token(token_id), 0.0) for token_id in range(3)]

    assert asyncio.run(fill()) == [True, True, False]


def test_reader_with_a_backlog_lets_others_have_their_turn() -> None:
    async def read() -> list[str]:
        order: list[str] = []

        async def drain(name: str) -> None:
            mailbox = Mailbox(limit=100)
            for token_id in range(2 * MAX_TAKEN):
                mailbox.put(token(token_id), 0.0)
            for _ in range(2):
                assert len((await mailbox.take())[0]) == MAX_TAKEN
                order.append(name)

        await asyncio.gather(drain("a"), drain("b"))
        return order

    assert asyncio.run(read()) == ["a", "b", "a", "b"]


def test_failure_comes_after_the_tokens_that_are_there() -> None:
    async def read() -> list[int]:
        mailbox = Mailbox(limit=2)
        mailbox.put(token(7), 0.0)
        mailbox.fail(EngineFailureError("gone"))
        first = await taken(mailbox)
        with pytest.raises(EngineFailureError, match="gone"):
            await mailbox.take()
        return first

    assert asyncio.run(read()) == [7]


def test_failure_wakes_a_waiting_reader() -> None:
    async def read() -> None:
        mailbox = Mailbox(limit=2)
        waiting = asyncio.ensure_future(mailbox.take())
        await asyncio.sleep(0)
        mailbox.fail(EngineFailureError("gone"))
        with pytest.raises(EngineFailureError):
            await waiting

    asyncio.run(read())


def test_reader_that_gave_up_is_not_woken() -> None:
    async def read() -> list[int]:
        mailbox = Mailbox(limit=2)
        waiting = asyncio.ensure_future(mailbox.take())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        mailbox.put(token(7), 0.0)
        return await taken(mailbox)

    assert asyncio.run(read()) == [7]
