"""Captured work: when it is captured, what it honours when it is replayed, when it is dropped."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from linker_core.engine.cuda.graphs import Replays
from tests.linker_core.engine.cuda.recorded import Recorder


class Counting:
    """A capture that runs nothing, and some work that counts its runs."""

    def __init__(self) -> None:
        self.captured = self.replayed = self.forgotten = self.runs = 0

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        del body
        self.captured += 1
        return self.replay

    def replay(self) -> None:
        self.replayed += 1

    def forget(self) -> None:
        self.forgotten += 1

    def body(self) -> None:
        self.runs += 1


class Running(Counting):
    """A capture that runs the work."""

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        return super().__call__(body)


def test_run_a_key_is_captured_when_it_comes_again_and_replayed_from_then_on() -> None:
    counting = Counting()
    replays = Replays(counting, limit=4)
    seen = []
    for _ in range(4):
        replays.run("key", counting.body)
        seen.append((counting.runs, counting.captured, counting.replayed))
    assert seen == [(1, 0, 0), (2, 1, 0), (2, 1, 1), (2, 1, 2)]


def test_run_without_a_key_or_a_capture_runs_every_time() -> None:
    counting = Counting()
    keyless, bare = Replays(counting, limit=4), Replays(None, limit=4)
    for _ in range(3):
        keyless.run(None, counting.body)
        bare.run("key", counting.body)
    assert (counting.runs, counting.captured) == (6, 0)
    assert len(keyless) == len(bare) == 0


def test_run_more_keys_than_the_limit_drops_the_one_used_longest_ago() -> None:
    counting = Counting()
    replays = Replays(counting, limit=2)
    for key in ("a", "a", "b", "b", "a", "c"):
        replays.run(key, counting.body)
        assert len(replays) <= 2
    runs, replayed = counting.runs, counting.replayed
    replays.run("a", counting.body)
    assert (counting.runs, counting.replayed) == (runs, replayed + 1)
    replays.run("b", counting.body)
    assert counting.runs == runs + 1


def test_forget_drops_replays_with_what_they_keep() -> None:
    replays = Replays(Running(), limit=2)
    numbers = [torch.arange(3)]
    seen = weakref.ref(numbers[0])
    for _ in range(2):
        replays.run("key", lambda: replays.keep(numbers[0]))
    numbers.clear()
    gc.collect()
    assert seen() is not None
    replays.forget()
    gc.collect()
    assert seen() is None


def test_run_work_that_makes_everything_forgotten_is_not_captured() -> None:
    counting = Counting()
    replays = Replays(counting, limit=2)
    replays.run("key", counting.body)
    replays.run("key", replays.forget)
    assert (counting.captured, counting.forgotten) == (0, 1)
    replays.run("key", counting.body)
    assert counting.captured == 1


def test_run_failed_work_leaves_no_replay() -> None:
    counting = Counting()
    replays = Replays(counting, limit=2)

    def fail() -> None:
        raise ZeroDivisionError

    replays.run("key", counting.body)
    with pytest.raises(ZeroDivisionError):
        replays.run("key", fail)
    replays.run("key", counting.body)
    assert (counting.runs, counting.captured, counting.replayed) == (2, 1, 0)


def test_recorder_replays_over_what_lies_there_and_does_nothing_before() -> None:
    x, y, index = torch.ones(3), torch.zeros(3), torch.tensor([2, 0, 1])

    def body() -> None:
        y.copy_(x[index] * 2.0)
        y[1:].add_(1.0)

    replay = Recorder()(body)
    assert y.tolist() == [0.0, 0.0, 0.0]
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    index.copy_(torch.tensor([0, 1, 2]))
    replay()
    assert y.tolist() == [2.0, 5.0, 7.0]


def test_recorder_refuses_work_that_asks_a_tensor_for_a_number() -> None:
    x = torch.ones(3)

    def body() -> None:
        x.add_(float(x[0]))

    with pytest.raises(AssertionError, match="waits for the device"):
        Recorder()(body)
