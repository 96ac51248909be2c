from __future__ import annotations

import asyncio

import pytest

from linker_core.engine.messages import TokenOutput
from linker_core.errors import EngineFailureError
from server.bridge.mailbox import Mailbox


def token(token_id: int) -> TokenOutput:
    return TokenOutput(request_id="r", token_id=token_id)


def test_tokens_come_out_in_order() -> None:
    async def read() -> list[int]:
        mailbox = Mailbox(limit=4)
        for token_id in (1, 2, 3):
            assert mailbox.put(token(token_id))
        return [(await mailbox.get()).token_id for _ in range(3)]

    assert asyncio.run(read()) == [1, 2, 3]


def test_full_mailbox_takes_no_more() -> None:
    async def fill() -> list[bool]:
        mailbox = Mailbox(limit=2)
        return [mailbox.put(token(token_id)) for token_id in range(3)]

    assert asyncio.run(fill()) == [True, True, False]


def test_failure_comes_after_the_tokens_that_are_there() -> None:
    async def read() -> int:
        mailbox = Mailbox(limit=2)
        mailbox.put(token(7))
        mailbox.fail(EngineFailureError("gone"))
        first = (await mailbox.get()).token_id
        with pytest.raises(EngineFailureError, match="gone"):
            await mailbox.get()
        return first

    assert asyncio.run(read()) == 7


def test_failure_wakes_a_waiting_reader() -> None:
    async def read() -> None:
        mailbox = Mailbox(limit=2)
        waiting = asyncio.ensure_future(mailbox.get())
        await asyncio.sleep(0)
        mailbox.fail(EngineFailureError("gone"))
        with pytest.raises(EngineFailureError):
            await waiting

    asyncio.run(read())
