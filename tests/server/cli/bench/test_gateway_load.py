from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from linker_core.errors import LinkerError
from server.cli.bench.gateway_load import Connection, Exchange, at_once, open_loop, request_bytes

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody"
STREAM = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    b"9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"
)
ASKED = request_bytes("/x", {"a": 1})


def served(parts: list[bytes], client: Callable[[int], object], *, hang_up: bool = False) -> object:
    """Runs a client against a server that answers every request with these parts."""

    handlers: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b'{"a":1}')
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)  # so that they arrive one by one
                if hang_up:
                    break
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def run() -> object:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            work = client(server.sockets[0].getsockname()[1])
            assert asyncio.iscoroutine(work)
            try:
                return await work
            finally:
                await asyncio.gather(*(each for each in handlers if each is not None))

    return asyncio.run(run())


def exchanges(found: object) -> list[Exchange]:
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("cut", range(1, len(STREAM), 7))
def test_stream_is_read_whole_however_it_is_cut(cut: int) -> None:
    parts = [STREAM[:cut], STREAM[cut:]]
    (found,) = exchanges(served(parts, lambda port: at_once(port, [ASKED])))
    assert found.status == 200
    assert found.events == [b"data: 1\n\n", b"data: 2\n\n"]
    assert found.asked_at < found.first_at <= found.done_at


def test_answers_of_a_known_length_follow_each_other_on_one_connection() -> None:
    async def ask_twice(port: int) -> list[Exchange]:
        connection = await Connection.open(port)
        found = await asyncio.gather(connection.ask(ASKED), connection.ask(ASKED))
        connection.close()
        return list(found)

    found = exchanges(served([WHOLE[:10], WHOLE[10:]], ask_twice))
    assert [bytes(each.body) for each in found] == [b"body", b"body"]
    assert found[1].asked_at < found[0].done_at < found[1].done_at


def test_longest_gap_is_that_between_two_arrivals() -> None:
    head, body = STREAM.split(b"\r\n\r\n", 1)
    parts = [head + b"\r\n\r\n" + body[:5], body[5:20], body[20:]]
    (found,) = exchanges(served(parts, lambda port: at_once(port, [ASKED])))
    assert 0 < found.longest_gap_s <= found.done_at - found.first_at


def test_open_loop_sends_every_request() -> None:
    found = exchanges(
        served(
            [WHOLE],
            lambda port: open_loop(port, [ASKED] * 9, num_connections=2, rate=1e4, seed=1),
        )
    )
    assert [each.status for each in found] == [200] * 9


def test_answer_that_is_no_success_is_an_error() -> None:
    refused = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy"
    with pytest.raises(LinkerError, match="429: b'busy'"):
        served([refused], lambda port: at_once(port, [ASKED]))


def test_connection_that_ends_before_its_answer_is_an_error() -> None:
    with pytest.raises(LinkerError, match="answered with 0"):
        served([b"HTTP/1.1"], lambda port: at_once(port, [ASKED]), hang_up=True)
