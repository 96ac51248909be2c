"""What the engine counts and times for the server's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from linker_core.engine.messages import Abort, UnloadModel
from linker_core.engine.runner import Chunk
from tests.linker_core.engine.driving import GREEDY, SMALL, Driver, load_message
from tests.linker_core.engine.serving import PROMPT, Served
from tests.tiny import make_checkpoint


class Clock:
    """Seconds that only tests move."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(tmp_path: Path, clock: Clock) -> Driver:
    """A donor alone, one sequence at a time, 24 rows a step."""
    driver = Driver(replace(SMALL, max_num_seqs=1), clock=clock)
    driver.load(load_message("base", make_checkpoint(tmp_path / "base", tie=False)))
    return driver


def test_first_token_says_how_long_its_sequence_waited_for_a_step(
    driver: Driver, clock: Clock
) -> None:
    request_id = driver.submit("base", PROMPT * 6)  # 42 tokens: two steps until the first token
    clock.now_s += 2.5
    driver.step()
    clock.now_s += 7.0
    driver.run()
    tokens = driver.outputs[request_id]
    assert [token.queued_s for token in tokens] == [2.5] + [None] * (GREEDY.max_tokens - 1)


def test_sequence_behind_another_waits_for_its_end(driver: Driver, clock: Clock) -> None:
    first = driver.submit("base", PROMPT, replace(GREEDY, max_tokens=2))
    second = driver.submit("base", PROMPT, replace(GREEDY, max_tokens=1))
    for _ in range(3):
        clock.now_s += 1.0
        driver.step()
    assert driver.outputs[first][0].queued_s == 1.0
    assert driver.outputs[second][0].queued_s == 3.0


def test_waiting_begins_when_the_server_submits_not_when_the_engine_reads(
    driver: Driver, clock: Clock
) -> None:
    early = driver.submit("base", PROMPT, submitted_s=clock.now_s - 4.0)  # a step was running
    clock.now_s += 1.0
    driver.run()
    assert driver.outputs[early][0].queued_s == 5.0


def test_steps_are_counted_by_their_distinct_models(served: Served) -> None:
    driver = served.driver
    for model in ("base", "own", "half"):
        driver.submit(model, PROMPT, replace(GREEDY, max_tokens=4))
    driver.submit("half", PROMPT[:1], replace(GREEDY, max_tokens=6))
    driver.run()
    report = driver.engine.snapshot()
    assert report.batch_variants == {3: 4, 1: 2}
    assert report.num_steps == 6


def test_engine_that_has_done_nothing_has_counted_nothing(driver: Driver) -> None:
    assert driver.engine.snapshot().batch_variants == {}  # the first token nobody gets is no step
    driver.run()
    aborted = driver.submit("base", PROMPT)
    driver.engine.handle(Abort(request_id=aborted))
    driver.run()
    assert driver.engine.snapshot().num_steps == 0


def test_counts_outlive_the_family_that_made_them(served: Served) -> None:
    driver = served.driver
    driver.generate("half", PROMPT)
    counted = driver.engine.snapshot().batch_variants
    assert counted == {1: GREEDY.max_tokens}
    for model in ("half", "own", "base"):
        driver.engine.handle(UnloadModel(model=model))
        driver.run()
    assert not driver.engine.residents.families
    assert driver.engine.snapshot().batch_variants == counted
    driver.load(load_message("base", served.paths["base"]))
    driver.generate("base", PROMPT)
    assert driver.engine.snapshot().batch_variants == {1: 2 * GREEDY.max_tokens}


def test_step_that_computes_nothing_is_no_step(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Sequence[Chunk]) -> None:
        raise RuntimeError("a kernel failed")

    driver = served.driver
    monkeypatch.setattr(driver.engine.residents.families["base"].runner, "forward", broken)
    driver.submit("base", PROMPT)
    driver.run()
    assert driver.engine.snapshot().batch_variants == {}


def test_snapshot_is_a_copy_of_what_was_counted(served: Served) -> None:
    driver = served.driver
    driver.generate("base", PROMPT)
    report = driver.engine.snapshot()
    driver.generate("base", PROMPT)
    assert report.num_steps == GREEDY.max_tokens
