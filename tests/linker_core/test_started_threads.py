from __future__ import annotations

import threading

import pytest

from linker_core.started_threads import started_threads


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
