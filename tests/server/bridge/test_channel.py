from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from server.bridge.channel import Channel

LARGE = b"x" * 3_000_000  # more than the buffers between take


class End:
    """This end: what came, and whether it is over."""

    def __init__(self, connection: Connection) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.channel = Channel(
            connection, on_message=self.messages.put_nowait, on_closed=self.closed.set
        )


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[End, Connection]]:
    ours, theirs = Pipe()
    end = End(ours)
    try:
        yield end, theirs
    finally:
        theirs.close()
        await end.closed.wait()


def test_messages_come_whole_and_in_order() -> None:
    async def exchange() -> list[object]:
        async with ends() as (end, theirs):
            sent = [{"number": 1}, LARGE, "last"]

            def send_all() -> None:
                for one in sent:
                    theirs.send(one)

            sender = threading.Thread(target=send_all)
            sender.start()
            found = [await end.messages.get() for _ in sent]
            sender.join()
            return found

    assert asyncio.run(exchange()) == [{"number": 1}, LARGE, "last"]


def test_messages_arrive_whole_and_in_order_where_nobody_reads_for_a_while() -> None:
    async def exchange() -> list[object]:
        async with ends() as (end, theirs):
            sent = [LARGE, (1, 2), "last"]
            for one in sent:
                end.channel.send(one)  # does not wait
            return [await asyncio.to_thread(theirs.recv) for _ in sent]

    assert asyncio.run(exchange()) == [LARGE, (1, 2), "last"]


def test_message_with_a_long_length_is_read() -> None:
    # As a connection sends what is longer than 2 GiB.
    async def exchange() -> object:
        async with ends() as (end, theirs):
            data = b"\x80\x04N."  # None
            os.write(theirs.fileno(), b"\xff\xff\xff\xff" + len(data).to_bytes(8) + data)
            return await end.messages.get()

    assert asyncio.run(exchange()) is None


def test_end_of_the_other_side_comes_after_its_last_message() -> None:
    async def exchange() -> tuple[int, bool]:
        async with ends() as (end, theirs):
            theirs.send("last")
            theirs.close()
            await end.closed.wait()
            end.channel.send("nobody hears it")
            return end.messages.qsize(), end.messages.get_nowait() == "last"

    assert asyncio.run(exchange()) == (1, True)


def test_message_that_breaks_its_handler_is_not_handed_over_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def exchange() -> list[object]:
        ours, theirs = Pipe()
        found: list[object] = []
        closed = asyncio.Event()

        def on_message(message: object) -> None:
            found.append(message)
            if message == "bad":
                raise ValueError("unexpected")

        Channel(ours, on_message=on_message, on_closed=closed.set)
        for message in ("bad", "good"):
            theirs.send(message)
        theirs.close()
        await closed.wait()
        return found

    assert asyncio.run(exchange()) == ["bad", "good"]
    assert "unexpected" in caplog.text
