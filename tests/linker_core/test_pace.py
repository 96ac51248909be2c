"""Restraint beside running sequences, on a clock of the tests' own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from linker_core.pace import Pace, Spent


class Clock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.on_sleep: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


@pytest.fixture(autouse=True)
def usual_scheduling() -> Iterator[None]:
    yield
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(bytes_per_s=100.0, work_share=0.25, ageing_s=600.0, clock=clock, sleep=clock.sleep)


def test_idle_work_never_rests(pace: Pace, clock: Clock) -> None:
    pace.after_read(10**9)
    pace.after_work(10.0)
    assert clock.now == 100.0
    assert pace.share == 1.0


def test_busy_reading_keeps_its_rate(pace: Pace, clock: Clock) -> None:
    pace.busy = True
    for _ in range(10):
        pace.after_read(50)
    assert clock.now == pytest.approx(105.0)
    clock.now += 60.0  # a pause is not saved up for a burst
    pace.after_read(100)
    assert clock.now == pytest.approx(166.0)


def test_busy_work_takes_its_share_of_the_time(pace: Pace, clock: Clock) -> None:
    pace.busy = True
    clock.now += 2.0
    pace.after_work(2.0)
    assert clock.now - 102.0 == pytest.approx(6.0, rel=0.02)


def test_share_grows_to_all_of_the_time_over_several_spells(pace: Pace, clock: Clock) -> None:
    pace.busy = True
    clock.now += 300.0
    assert pace.share == pytest.approx(0.25 + 0.75 / 2)
    pace.busy = False
    clock.now += 10_000.0
    pace.busy = True
    assert pace.share == pytest.approx(0.25 + 0.75 / 2)
    clock.now += 300.0
    assert pace.share == 1.0
    before = clock.now
    pace.after_work(5.0)
    assert clock.now == before


def test_rest_ends_when_the_sequences_do(pace: Pace, clock: Clock) -> None:
    pace.busy = True

    def stop_soon() -> None:
        if clock.now > 103.0:
            pace.busy = False

    clock.on_sleep = stop_soon
    pace.after_read(10**6)
    assert 103.0 < clock.now < 103.2


def policies() -> set[int]:
    return {os.sched_getscheduler(int(task.name)) for task in Path("/proc/self/task").iterdir()}


def test_every_thread_is_lowered_while_busy_and_raised_again(pace: Pace, clock: Clock) -> None:
    done = threading.Event()
    worker = threading.Thread(target=done.wait)
    worker.start()
    try:
        pace.busy = True
        assert policies() == {os.SCHED_IDLE}
        pace.busy = False
        assert policies() == {os.SCHED_OTHER}
        pace.busy = True
        clock.now += 600.0
        pace.after_work(1.0)  # old enough to compete
        assert policies() == {os.SCHED_OTHER}
    finally:
        done.set()
        worker.join()


def test_refused_scheduling_is_said_once(
    pace: Pace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with caplog.at_level(logging.INFO):
        for busy in (True, False, True):
            pace.busy = busy
    monkeypatch.undo()
    assert len(caplog.records) == 1
    assert pace.busy


def test_one_thread_at_a_time_while_busy(pace: Pace) -> None:
    pace.busy = True
    inside, most, entered = 0, 0, threading.Barrier(4)
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        entered.wait()
        for _ in range(200):
            with pace.turn():
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_idle_threads_take_their_turns_together(pace: Pace) -> None:
    together = threading.Barrier(2, timeout=60.0)

    def work() -> None:
        with pace.turn():
            together.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not together.broken


def test_follow_obeys_the_lines_and_the_end() -> None:
    heard: list[bool] = []

    class Recorder(Pace):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "busy":
                heard.append(bool(value))
                if len(heard) == 4:
                    ended.set()
            super().__setattr__(name, value)

    ended = threading.Event()
    recorder = Recorder()
    recorder.follow(io.StringIO("busy\nidle\nbusy\n"))
    assert ended.wait(60.0)
    assert heard == [True, False, True, False]


def test_time_is_accounted_by_whether_sequences_ran(clock: Clock) -> None:
    cpu = Clock()
    pace = Pace(clock=clock, sleep=clock.sleep, cpu_clock=cpu)
    clock.now, cpu.now = 102.0, 103.0  # two cores
    assert pace.spent == Spent(busy_s=0.0, busy_cpu_s=0.0, idle_s=2.0, idle_cpu_s=3.0)
    pace.busy = True
    clock.now, cpu.now = 112.0, 103.5
    assert pace.spent == Spent(busy_s=10.0, busy_cpu_s=0.5, idle_s=2.0, idle_cpu_s=3.0)
    pace.busy = True  # told twice
    pace.busy = False
    clock.now, cpu.now = 113.0, 105.5
    pace.busy = True
    clock.now, cpu.now = 114.0, 105.75
    assert pace.spent == Spent(busy_s=11.0, busy_cpu_s=0.75, idle_s=3.0, idle_cpu_s=5.0)
