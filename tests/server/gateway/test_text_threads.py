from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from linker_core.text.tokenizer import Tokenizer
from server.gateway.text_threads import SHORT_CHARS, TextThreads
from tests.linker_core.test_started_threads import no_more
from tests.linker_core.text import tokenizers_by_kind as kinds
from tests.server.live import LiveServer

LONG = SHORT_CHARS + 1


def tokenizer() -> Tokenizer:
    return Tokenizer(kinds.byte_level(), bos_token=None, eos_token=None)


def test_long_texts_go_on_where_no_thread_can_be_started_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        threads, own = TextThreads(), tokenizer()
        monkeypatch.setattr(threading.Thread, "start", no_more)
        for _ in range(2):
            assert await threads.run(lambda: "long", tokenizer=own, num_chars=LONG)
        threads.close()

    asyncio.run(test())


def test_slow_tokenizer_keeps_no_other_and_no_short_text_waiting() -> None:
    async def test() -> None:
        threads, slow, other = TextThreads(), tokenizer(), tokenizer()
        done, begun = threading.Event(), threading.Event()
        num_begun = 0

        def wedged() -> None:
            nonlocal num_begun
            num_begun += 1
            begun.set()
            assert done.wait(60)

        stuck = [
            asyncio.ensure_future(threads.run(wedged, tokenizer=slow, num_chars=LONG))
            for _ in range(5)
        ]
        await asyncio.to_thread(begun.wait, 60)
        assert await threads.run(lambda: "short", tokenizer=slow, num_chars=SHORT_CHARS) == "short"
        assert await threads.run(lambda: "long", tokenizer=other, num_chars=LONG) == "long"
        assert num_begun == 1
        done.set()
        await asyncio.gather(*stuck)
        assert num_begun == 5
        threads.close()

    asyncio.run(test())


def test_turn_ends_with_the_work_and_not_with_the_wait() -> None:
    async def test() -> None:
        threads, slow = TextThreads(), tokenizer()
        done, begun = threading.Event(), threading.Event()

        def wedged() -> None:
            begun.set()
            assert done.wait(60)

        left = asyncio.ensure_future(threads.run(wedged, tokenizer=slow, num_chars=LONG))
        await asyncio.to_thread(begun.wait, 60)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        after = asyncio.ensure_future(threads.run(lambda: 1, tokenizer=slow, num_chars=LONG))
        assert await threads.run(lambda: 2, tokenizer=tokenizer(), num_chars=LONG) == 2
        assert not after.done()
        done.set()
        assert await after == 1
        threads.close()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("is_light", "num_chars", "is_linear", "in_thread"),
    [
        (True, 2048, True, False),
        (True, 2049, True, True),
        (True, 1, False, True),
        (False, 1, True, True),
    ],
)
def test_only_what_is_known_to_be_quick_runs_in_the_loop(
    is_light: bool, num_chars: int, is_linear: bool, in_thread: bool
) -> None:
    async def test() -> None:
        threads = TextThreads()
        one = Tokenizer(kinds.byte_level(), bos_token=None, eos_token=None, is_linear=is_linear)
        ran_in = await threads.run(
            threading.get_ident, tokenizer=one, num_chars=num_chars, is_light=is_light
        )
        assert (ran_in != threading.get_ident()) == in_thread
        threads.close()

    asyncio.run(test())


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
def test_long_text_of_a_client_that_left_waits_no_longer(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Others may wait for their turn in its place, and its text is let go."""
    threads, text = server.services.text_threads, server.served("near").text
    run, begun, ended = threads.run, list[int](), list[int]()

    async def seen(work: Callable[[], Any], *, num_chars: int, **more: Any) -> Any:
        begun.append(num_chars)
        try:
            return await run(work, num_chars=num_chars, **more)
        finally:
            ended.append(num_chars)

    free = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = run(free.wait, tokenizer=text.tokenizer, num_chars=SHORT_CHARS + 1)
        pool.submit(server.call, slow)
        try:
            monkeypatch.setattr(threads, "run", seen)
            body = json.dumps({"model": "near", "prompt": "a " * SHORT_CHARS}).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            address = ("127.0.0.1", server.client.base_url.port or 0)
            with socket.create_connection(address) as client:
                client.sendall(f"{head}\r\n\r\n".encode() + body)
                server.until(lambda: bool(begun))
            server.until(lambda: ended == begun)
        finally:
            free.set()
