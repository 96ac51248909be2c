from __future__ import annotations

import threading

import pytest

from linker_core.engine.background import in_background


def test_loop_goes_on_until_the_work_is_done() -> None:
    may_end, threads = threading.Event(), []

    def work() -> None:
        threads.append(threading.current_thread())
        assert may_end.wait(60)

    looks = in_background(work)
    for _ in range(3):
        next(looks)
    may_end.set()
    for _ in looks:
        pass
    (thread,) = threads
    assert thread is not threading.current_thread()
    thread.join(60)
    assert not thread.is_alive()


def test_failure_of_the_work_is_raised() -> None:
    def fail() -> None:
        raise KeyError("lm_head.weight")

    with pytest.raises(KeyError, match="lm_head"):
        for _ in in_background(fail):
            pass


def test_work_goes_on_to_its_end_when_nobody_looks() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        assert may_end.wait(60)
        ended.set()

    looks = in_background(work)
    next(looks)
    looks.close()
    may_end.set()
    assert ended.wait(60)
