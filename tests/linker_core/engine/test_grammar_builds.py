"""Grammars that wait to be compiled: how many, in which order, and what becomes of a failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from llguidance import LLMatcher

from linker_core.engine import grammar_trial
from linker_core.engine.grammar_builds import MAX_WAITING, GrammarBuilds
from linker_core.engine.messages import Abort
from linker_core.engine.sequence import SequenceState
from linker_core.errors import EngineFailureError, LinkerError, QueueFullError
from tests.linker_core.engine.driving import GREEDY
from tests.linker_core.engine.sampling.rows import sequence
from tests.linker_core.engine.serving import PROMPT, Served
from tests.linker_core.test_started_threads import no_more

GRAMMAR = LLMatcher.grammar_from_regex("a+")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every trial of later engines back; each then fails for a reason of the machine's."""
    opened = threading.Event()

    def ends(_grammar: str) -> bool:
        opened.wait()
        raise MemoryError("secret")

    monkeypatch.setattr(grammar_trial, "ends", ends)
    yield opened
    opened.set()


def of_slot(slot: int) -> SequenceState:
    state = sequence(grammar=GRAMMAR, vocab_size=512)
    state.slot = slot
    return state


def start(builds: GrammarBuilds, served: Served, slots: list[int]) -> list[SequenceState]:
    states = [of_slot(slot) for slot in slots]
    for state in states:
        builds.start(state, served.paths["base"])
    return states


def drain(builds: GrammarBuilds) -> list[SequenceState]:
    done = []
    while builds.num_pending:
        done += [state for state, _ in builds.finished(1.0)]
    return done


def test_models_take_turns(gate: threading.Event, served: Served) -> None:
    builds = GrammarBuilds()
    states = start(builds, served, [0, 0, 0, 1, 1, 2])
    gate.set()
    assert [states.index(state) for state in drain(builds)] == [0, 1, 3, 5, 2, 4]


def test_a_model_with_too_many_waiting_is_refused_alone(
    gate: threading.Event, served: Served
) -> None:
    builds = GrammarBuilds()
    states = start(builds, served, [0] * (MAX_WAITING + 1))  # one of them is being built
    with pytest.raises(QueueFullError):
        start(builds, served, [0])
    (other,) = start(builds, served, [1])
    assert builds.cancel(states[5])
    assert not builds.cancel(states[5])
    start(builds, served, [0])
    assert builds.num_pending == MAX_WAITING + 2
    gate.set()
    assert drain(builds)[2] is other


def test_the_engine_refuses_what_cannot_wait(gate: threading.Event, served: Served) -> None:
    driver, params = served.driver, replace(GREEDY, grammar=GRAMMAR)
    waiting = [driver.submit("base", PROMPT, params) for _ in range(MAX_WAITING + 1)]
    refused = driver.submit("base", PROMPT, params)
    plain = driver.submit("base", PROMPT)
    for request_id in waiting:
        driver.engine.handle(Abort(request_id=request_id))
    gate.set()
    driver.run()
    assert {key: found["code"] for key, found in driver.errors.items()} == {refused: "queue_full"}
    assert len(driver.tokens(plain)) == GREEDY.max_tokens


def test_a_cancelled_build_is_not_reported_and_the_next_one_comes(
    gate: threading.Event, served: Served
) -> None:
    builds = GrammarBuilds()
    first, second = start(builds, served, [0, 0])
    assert builds.cancel(first)
    gate.set()
    assert drain(builds) == [second]


def test_a_closed_engine_waits_for_no_grammar_but_the_one_begun(
    gate: threading.Event, served: Served
) -> None:
    driver = served.driver
    for _ in range(5):
        driver.submit("base", PROMPT, replace(GREEDY, grammar=GRAMMAR))
    builds = driver.engine._grammars
    assert builds._building is not None
    while not builds._building.future.running():
        time.sleep(0.001)
    driver.engine.close()
    assert builds.num_pending == 0
    gate.set()
    builds._executor.shutdown(wait=True)
    assert "secret" in str(builds._building.future.exception())
    assert builds._ends.cache_info().misses == 1


def test_a_fault_of_the_machine_is_not_the_grammars(
    gate: threading.Event, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    builds = GrammarBuilds()
    start(builds, served, [0])
    gate.set()
    outcomes: list[object] = []
    while builds.num_pending:
        outcomes += [outcome for _, outcome in builds.finished(1.0)]
    (error,) = outcomes
    assert isinstance(error, EngineFailureError)
    assert not {"MemoryError", "secret"} & set(error.message.replace(":", " ").split())
    assert "MemoryError" in caplog.text


def test_a_machine_without_threads_later_compiles_all_the_same(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = GrammarBuilds()
    monkeypatch.setattr(threading.Thread, "start", no_more)
    monkeypatch.setattr(grammar_trial, "ends", lambda _grammar: True)
    states = start(builds, served, [0])
    assert drain(builds) == states


def test_a_grammar_that_is_no_text_is_its_own_fault(served: Served) -> None:
    builds = GrammarBuilds()
    state = sequence(grammar="\ud800", vocab_size=512)
    builds.start(state, Path(served.paths["base"]))
    outcomes: list[object] = []
    while builds.num_pending:
        outcomes += [outcome for _, outcome in builds.finished(1.0)]
    assert isinstance(outcomes[0], LinkerError)
    assert outcomes[0].code == "invalid_request_error"
