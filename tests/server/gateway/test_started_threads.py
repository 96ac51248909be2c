from __future__ import annotations

import asyncio
import threading

import pytest

from server.gateway.started_threads import started_threads
from server.gateway.text_threads import SHORT_CHARS, TextThreads
from tests.server.gateway.test_text_threads import tokenizer


def no_more(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_pool_works_at_full_width_where_no_thread_can_be_started_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with started_threads(3, "test") as pool:
        monkeypatch.setattr(threading.Thread, "start", no_more)
        together = threading.Barrier(3)
        works = [pool.submit(together.wait, 60) for _ in range(3)]
        assert sorted(work.result() for work in works) == [0, 1, 2]


def test_pool_that_cannot_be_started_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    begun: list[threading.Thread] = []

    def only_two(thread: threading.Thread) -> None:
        if len(begun) == 2:
            no_more(thread)
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", only_two)
    with pytest.raises(RuntimeError, match="can't start"):
        started_threads(3, "test")
    for thread in begun:
        thread.join(60)
        assert not thread.is_alive()


def test_long_texts_go_on_where_no_thread_can_be_started_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        threads, own = TextThreads(), tokenizer()
        monkeypatch.setattr(threading.Thread, "start", no_more)
        for _ in range(2):
            assert await threads.run(lambda: "long", tokenizer=own, num_chars=SHORT_CHARS + 1)
        threads.close()

    asyncio.run(test())
