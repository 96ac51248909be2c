"""What a connection may do: requests that do not arrive, are too large, or are no requests."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import pytest
import uvloop
from starlette.types import Receive, Scope, Send

from tests.server.gateway.raw_http import GET, PATIENCE_S, Echo, error_of, serving, statuses

POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
_Result = TypeVar("_Result")


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    async def bounded() -> _Result:
        async with asyncio.timeout(2 * PATIENCE_S):
            return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as `linker serve`
        return runner.run(bounded())


@pytest.mark.parametrize(
    ("part", "time"),
    [(b"GET / HTTP/1.1\r\nHost: x\r\nA: ", "header_timeout_s"),
     (POST + b"Content-Length: 100\r\n\r\nabc", "body_timeout_s"),
     (POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "body_timeout_s")],
)  # fmt: skip
def test_request_that_does_not_arrive_is_408_and_its_connection_ends(
    part: bytes, time: str
) -> None:
    async def main() -> None:
        app = Echo()
        async with serving(app, **{time: 0.1}) as site:
            received = await site.say(part)
            assert statuses(received) == [408]
            assert error_of(received)["code"] == "request_timeout"
            assert b"connection: close\r\n" in received
            assert site.refused == ["request_timeout"]
            assert statuses(
                await site.say(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            ) == [200]
        assert app.left == (time == "body_timeout_s")

    run(main())


@pytest.mark.parametrize(
    ("begin", "endless"),
    [(b"", b"GET /aaaaaaaaaaaaaaaaaaaaa"), (b"GET / HTTP/1.1\r\n", b"A: aaaaaaaaa"),
     (POST + b"Content-Length: 1000000\r\n\r\n", b"a"),
     (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n")],
)  # fmt: skip
def test_client_that_trickles_is_408(begin: bytes, endless: bytes) -> None:
    async def main() -> None:
        limits = {"header_timeout_s": 0.2, "body_timeout_s": 0.2}
        async with serving(Echo(), **limits) as site, site.connection() as client:
            await client.send(begin)
            rest = asyncio.ensure_future(client.rest())
            await client.trickle(itertools.islice(itertools.cycle(endless), 2000))
            assert statuses(await rest) == [408]

    run(main())


def test_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async def main() -> None:
        async with serving(Echo(), header_timeout_s=0.1) as site:
            assert await site.say() == b""
            assert not site.refused

    run(main())


@pytest.mark.parametrize("noise", [b"", b"\r\n\r\n\r\n\r\n"])
def test_connection_that_is_not_used_again_is_closed(noise: bytes) -> None:
    async def main() -> None:
        async with serving(Echo(), idle_timeout_s=0.2) as site, site.connection() as client:
            await client.send(GET)
            assert await client.answer() == (200, b"")
            await client.trickle(noise)
            assert await client.rest() == b""

    run(main())


def test_connection_serves_one_request_after_the_other() -> None:
    async def main() -> None:
        limits = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "idle_timeout_s": 5}
        async with serving(Echo(), **limits) as site, site.connection() as client:
            for number in range(5):
                body = b"%d" % number
                await client.send(POST + b"Content-Length: 1\r\n\r\n")
                await client.send(body)
                assert await client.answer() == (200, body)
                await asyncio.sleep(0.15)  # together they take longer than any one may

    run(main())


def test_pipelined_requests_are_answered_in_order() -> None:
    async def main() -> None:
        async with serving(Echo(), header_timeout_s=0.3) as site, site.connection() as client:
            bodies = [b"%d" % number for number in range(8)]
            await client.send(b"".join(POST + b"Content-Length: 1\r\n\r\n" + b for b in bodies))
            assert [await client.answer() for _ in bodies] == [(200, body) for body in bodies]

    run(main())


def test_garbage_behind_a_request_spoils_no_answer() -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await release.wait()
            await send({"type": "http.response.body", "body": b"two"})

        async with serving(app) as site, site.connection() as client:
            await client.send(GET + b"\x00\x01\x02 what is this\r\n\r\n")
            begun = await client.reader.readuntil(b"3\r\none\r\n")
            release.set()
            received = begun + await client.rest()
        assert statuses(received) == [200, 400]
        assert received.index(b"3\r\ntwo\r\n0\r\n\r\n") < received.index(b"HTTP/1.1 400")

    run(main())


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        b"GET / HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"GET / HTTP/0.9\r\nConnection: keep-alive\r\n\r\n",
    ],
)
@pytest.mark.parametrize("length", [None, b"6"])
def test_old_clients_get_no_chunks_but_the_end(head: bytes, length: bytes | None) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [] if length is None else [(b"Content-Length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two", "more_body": True})
        await send({"type": "http.response.body"})

    async def main() -> None:
        async with serving(app) as site:
            answer, _, body = (await site.say(head)).partition(b"\r\n\r\n")
            assert body == b"onetwo"
            assert b"transfer-encoding" not in answer
            assert b"connection: close" in answer
            _, _, body = (await site.say(head.replace(b"GET", b"HEAD"))).partition(b"\r\n\r\n")
            assert body == b""

    run(main())


def test_client_that_ends_its_side_has_left() -> None:
    async def main() -> None:
        begun, left = asyncio.Event(), asyncio.Event()

        async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
            begun.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        async with serving(app) as site, site.connection() as client:
            await client.send(GET)
            await begun.wait()
            client.writer.write_eof()
            await left.wait()
            assert await client.rest() == b""

    run(main())


def test_too_many_pipelined_requests_are_not_kept() -> None:
    async def main() -> None:
        app = Echo()
        async with serving(app) as site:
            words = await site.say(GET * 5000)
            assert site.refused == ["rate_limit_exceeded"]
        assert error_of(words)["code"] == "rate_limit_exceeded"
        assert "At most 16 requests" in error_of(words)["message"]
        assert b"retry-after: 1\r\n" in words
        received = statuses(words)
        assert received[-1] == 429
        assert set(received[:-1]) == {200}
        assert len(app.asked) == len(received) - 1 < 50

    run(main())


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 900_000, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"A: a\r\n" * 101 + b"\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"A: a\r\n" * 900_000, 431, "headers_too_large"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, "uri_too_long"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=" + b"b" * 2_000_000, 413,
         "request_too_large"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n" + b"T: t\r\n" * 500_000, 413,
         "request_too_large"),
    ],
    ids=["header", "endless header", "headers", "endless headers", "path", "chunk extension",
         "trailers"],
)  # fmt: skip
def test_request_without_an_end_is_refused(request_: bytes, status: int, code: str) -> None:
    async def main() -> None:
        app = Echo()
        async with serving(app, max_body_bytes=100_000) as site:
            received = await site.say(request_)
            assert statuses(received) == [status]
            assert error_of(received)["code"] == code
            assert site.refused == [code]
        assert app.left == len(app.asked) <= 1

    run(main())


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5, 5",
        b"Content-Length: +5",
        b"Content-Length: -5",
        b"Content-Length: 0x5",
        b"Content-Length: 5 5",
        b"Content-Length: 99999999999999999999999",
        b"Content-Length : 5",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding : chunked",
        b"A: b\r\n Transfer-Encoding: chunked",
        b"A: b\x00c",
        b"A: b\rTransfer-Encoding: chunked",
        b" A: b",
        b"A b: c",
    ],
)
def test_request_that_two_readers_may_read_differently_is_400(head: bytes) -> None:
    async def main() -> None:
        app = Echo()
        async with serving(app, body_timeout_s=0.5) as site:
            received = await site.say(POST + head + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + GET)
            assert statuses(received) == [400], received
            assert error_of(received)["code"] == "invalid_request_error"
        assert app.left == len(app.asked)  # none was seen whole

    run(main())


@pytest.mark.parametrize(
    "chunks",
    [b"5\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"-1\r\n", b"+5\r\nhello\r\n0\r\n\r\n",
     b"fffffffffffffffff\r\nhello", b"5\r\nhelloXX\r\n0\r\n\r\n", b"\r\n5\r\nhello\r\n0\r\n\r\n",
     b"5 \r\nhello\r\n0\r\n\r\n", b"g\r\nhello"],
)  # fmt: skip
def test_chunk_that_two_readers_may_read_differently_is_400(chunks: bytes) -> None:
    async def main() -> None:
        app = Echo()
        async with serving(app) as site:
            received = await site.say(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
            assert statuses(received) == [400], received
        assert app.left == len(app.asked)

    run(main())


def test_trailers_are_no_headers() -> None:
    async def main() -> None:
        app = Echo()
        chunks = b"1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
        async with serving(app) as site, site.connection() as client:
            await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
            assert await client.answer() == (200, b"a")
        assert b"authorization" not in dict(app.asked[0]["headers"])

    run(main())


@pytest.mark.parametrize(
    "line",
    [b"CONNECT x:1 HTTP/1.1", b"GET x HTTP/1.1", b"GET http://y/ HTTP/9.9", b"BREW / HTTP/1.1",
     b"get / HTTP/1.1", b"GET / HTTP/1.1 x", b"GET /\xff HTTP/1.1", b"PRI * HTTP/2.0",
     b"\x16\x03\x01", b"GET / SPDY/1"],
)  # fmt: skip
def test_what_is_no_request_is_400(line: bytes) -> None:
    async def main() -> None:
        async with serving(Echo(), header_timeout_s=0.5) as site:
            received = await site.say(line + b"\r\nHost: x\r\n\r\n")
            assert statuses(received) == [400]
            assert error_of(received)["code"] == "invalid_request_error"

    run(main())


@pytest.mark.parametrize(
    "method", [b"HEAD", b"OPTIONS", b"TRACE", b"PROPFIND", b"PATCH", b"DELETE"]
)
def test_any_method_reaches_the_application(method: bytes) -> None:
    async def main() -> None:
        app = Echo()
        async with serving(app) as site:
            received = await site.say(
                method + b" / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            )
            assert statuses(received) == [200]
        assert [scope["method"].encode() for scope in app.asked] == [method]

    run(main())


def test_http_1_0_is_answered_and_closed() -> None:
    async def main() -> None:
        async with serving(Echo()) as site:
            received = await site.say(b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi")
            assert statuses(received) == [200]
            assert received.endswith(b"\r\n\r\nhi")

    run(main())


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 2\r\n\r\nhi",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    ],
)
def test_upgrade_that_nobody_offers_is_ignored(body: bytes) -> None:
    async def main() -> None:
        app = Echo()
        async with serving(app) as site, site.connection() as client:
            upgrade = (
                b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n"
            )
            for _ in range(2):
                await client.send(POST + upgrade + body)
                assert await client.answer() == (200, b"hi")
            await client.send(GET + GET)
            assert [await client.answer() for _ in range(2)] == [(200, b"")] * 2
        assert b"upgrade" not in dict(app.asked[0]["headers"])

    run(main())


@pytest.mark.parametrize(
    ("limits", "status"),
    [({"max_connections": 2}, 503), ({"max_connections_per_address": 2}, 429)],
)
def test_one_connection_too_many_is_told_and_closed(limits: dict[str, int], status: int) -> None:
    async def main() -> None:
        async with serving(Echo(), **limits) as site:
            async with site.connection() as first, site.connection() as second:
                for client in (first, second):
                    await client.send(GET)
                    assert await client.answer() == (200, b"")
                received = await site.say(GET)
                assert statuses(received) == [status]
                assert error_of(received)["code"] == "too_many_connections"
                assert re.search(rb"retry-after: [12]\r\n", received)
                await first.send(GET)
                assert await first.answer() == (200, b"")  # nobody else is worse off
            while len(site.config.peers):
                await asyncio.sleep(0.01)
            async with site.connection() as client:
                await client.send(GET)
                assert await client.answer() == (200, b"")

    run(main())


def test_flood_of_connections_is_hung_up_on() -> None:
    async def main() -> None:
        async with serving(Echo(), max_connections=4) as site, AsyncExitStack() as silent:
            for _ in range(4 + 64):  # served, or to be told why they are not
                await silent.enter_async_context(site.connection())
            while len(site.config.peers) < 4 + 64:
                await asyncio.sleep(0.01)
            for _ in range(30):
                assert await site.say() == b""
            assert len(site.config.peers) == 4 + 64

    run(main())


class Firehose:
    """An application that answers with as much as is taken, or with one large piece."""

    def __init__(self, pieces: int, piece: bytes) -> None:
        self.ended = asyncio.Event()
        self._pieces, self._piece = pieces, piece

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(self._pieces):
                await send({"type": "http.response.body", "body": self._piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.ended.set()


@pytest.mark.parametrize(("pieces", "size"), [(100_000, 1000), (1, 20_000_000)])
def test_answer_that_is_not_read_is_cut_off(
    pieces: int, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        app = Firehose(pieces, b"x" * size)
        async with serving(app, send_timeout_s=0.2) as site, site.connection() as client:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            await client.send(GET)
            while not site.config.peers:
                await asyncio.sleep(0.01)
            while len(site.config.peers):
                await asyncio.sleep(0.01)
            await app.ended.wait()

    run(main())
    assert "was not read for 0.2 s" in caplog.text


def test_slow_reader_that_goes_on_reading_gets_all_of_it() -> None:
    async def main() -> None:
        size = 12_000_000
        async with serving(Firehose(1, b"x" * size), send_timeout_s=0.3) as site:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port, limit=65536)
            writer.write(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            received = 0
            while chunk := await reader.read(65536):
                received += len(chunk)
                await asyncio.sleep(0.005)
            writer.close()
        assert received > size

    run(main())


@pytest.mark.parametrize("sent", [0, 10, 200_000])
def test_answer_to_a_request_that_is_still_coming_is_not_lost(sent: int) -> None:
    async def refuse(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"2"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": b"no"})

    async def main() -> None:
        async with serving(refuse) as site, site.connection() as client:
            await client.send(POST + b"Content-Length: 300000\r\n\r\n" + b"a" * sent)
            rest = asyncio.ensure_future(client.rest())
            await asyncio.sleep(0)
            await client.send(b"a" * 90_000)  # a socket that is closed would answer with a reset
            assert (await rest).endswith(b"\r\n\r\nno")

    run(main())


def test_request_that_is_sent_as_the_server_stops_is_answered() -> None:
    async def main() -> None:
        async with AsyncExitStack() as clients, serving(Echo()) as site:
            fresh = await clients.enter_async_context(site.connection())
            used = await clients.enter_async_context(site.connection())
            await used.send(GET)
            assert await used.answer() == (200, b"")
            while len(site.config.peers) < 2:
                await asyncio.sleep(0.01)
            site.server.should_exit = True
            while not site.server.servers or site.server.servers[0].is_serving():
                await asyncio.sleep(0.001)
            for client in (fresh, used):
                await client.send(GET)
            for client in (fresh, used):
                received = await client.rest()
                assert statuses(received) == [200]
                assert b"connection: close\r\n" in received

    run(main())
