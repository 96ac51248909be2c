"""A fault in one row ends that request alone: all others say what they would have said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from linker_core.engine.engine import MAX_CRASHED_STEPS
from linker_core.engine.messages import ModelLoaded, SamplingParams, Submit
from linker_core.engine.prompt_logprobs import PromptLogprobs
from linker_core.engine.runner import Chunk, Runner
from tests.linker_core.engine.driving import GREEDY, Driver, load_message
from tests.linker_core.engine.serving import PROMPT, Served
from tests.tiny import make_variant, save_state

POISON = 509
SEEDED = SamplingParams(max_tokens=8, temperature=1.3, top_p=0.9)
MODELS = ("base", "own", "half")


class Poisoned:
    """A runner's forward pass that fails where a token is among its rows.

    Attributes:
        sizes: Number of chunks of every pass, in order.
    """

    def __init__(self, runner: Runner, error: Callable[[], BaseException]) -> None:
        self._forward = runner.forward
        self._error = error
        self.sizes: list[int] = []

    def __call__(self, chunks: Sequence[Chunk]) -> Any:
        self.sizes.append(len(chunks))
        if any(POISON in chunk.token_ids for chunk in chunks):
            raise self._error()
        return self._forward(chunks)


def poison(
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], BaseException] = lambda: RuntimeError("a kernel failed"),
) -> Poisoned:
    runner = driver.engine.residents.families["base"].runner
    poisoned = Poisoned(runner, error)
    monkeypatch.setattr(runner, "forward", poisoned)
    return poisoned


def mates(driver: Driver, numbers: Iterable[int]) -> list[str]:
    """Greedy and seeded requests of all variants, each always the same."""
    return [
        driver.submit(
            MODELS[n % 3],
            [n + 3, *PROMPT],
            replace(GREEDY if n % 2 else SEEDED, seed=n, max_tokens=6 + n),
        )
        for n in numbers
    ]


def answers(driver: Driver, ids: list[str]) -> list[list[int]]:
    driver.run()
    assert not set(ids) & set(driver.errors)
    found = [driver.tokens(request_id) for request_id in ids]
    assert not any(POISON in tokens for tokens in found), (
        "an answer has it by chance: choose another"
    )
    return found


@pytest.mark.parametrize(
    "error",
    [lambda: RuntimeError("a kernel failed"), MemoryError, torch.OutOfMemoryError, AssertionError],
)
def test_a_chunk_that_raises_fails_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]
) -> None:
    driver = served.driver
    want = answers(driver, mates(driver, range(5)))
    poison(driver, monkeypatch, error)
    others = mates(driver, range(3))
    culprit = driver.submit("own", [POISON, *PROMPT])
    others += mates(driver, range(3, 5))
    assert answers(driver, others) == want
    assert driver.errors[culprit]["code"] == "engine_failure"
    assert driver.engine.residents.families["base"].cache.num_used_pages == 0


def test_a_chunk_that_raises_while_decoding_fails_alone_and_keeps_its_tokens(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = served.driver
    want = answers(driver, mates(driver, range(4)))
    poison(driver, monkeypatch)
    # The culprit chooses the token that its next step fails on.
    culprit = driver.submit("base", PROMPT, replace(GREEDY, logit_bias={POISON: 1000.0}))
    assert answers(driver, mates(driver, range(4))) == want
    assert driver.tokens(culprit) == [POISON]
    assert driver.errors[culprit]["code"] == "engine_failure"


def test_the_culprit_is_found_by_halving(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = served.driver
    poisoned = poison(driver, monkeypatch)
    for n in range(7):
        driver.submit("base", [n + 3], replace(GREEDY, max_tokens=1))
    culprit = driver.submit("base", [POISON], replace(GREEDY, max_tokens=1))
    driver.step()
    assert culprit in driver.errors
    assert sorted(poisoned.sizes) == [1, 1, 2, 2, 4, 4, 8]
    assert sum(len(tokens) for tokens in driver.outputs.values()) == 7


def test_faults_beside_working_rows_never_end_the_engine(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = served.driver
    poison(driver, monkeypatch)
    healthy = driver.submit("base", PROMPT, replace(GREEDY, max_tokens=3 * MAX_CRASHED_STEPS))
    driver.step()
    culprits = []
    for _ in range(2 * MAX_CRASHED_STEPS):
        culprits.append(driver.submit("base", [POISON]))
        driver.step()
    assert answers(driver, [healthy])
    assert set(culprits) == set(driver.errors)


@pytest.mark.parametrize("model", MODELS)
def test_a_request_that_always_fails_alone_never_ends_the_engine(
    served: Served, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    driver = served.driver
    want = answers(driver, mates(driver, range(3)))
    poison(driver, monkeypatch)
    culprits = []
    for _ in range(2 * MAX_CRASHED_STEPS):
        culprits.append(driver.submit(model, [POISON]))
        driver.run()
    assert {driver.errors[request_id]["code"] for request_id in culprits} == {"engine_failure"}
    assert driver.engine.residents.families["base"].cache.num_used_pages == 0
    assert answers(driver, mates(driver, range(3))) == want


def test_a_model_that_never_computes_does_not_end_the_engine_for_the_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = served.driver
    runner = driver.engine.residents.families["base"].runner
    slot = driver.engine.residents.served["base"].slot
    forward = runner.forward

    def failing(chunks: Sequence[Chunk]) -> Any:
        if any(chunk.slot == slot for chunk in chunks):
            raise RuntimeError("a kernel failed")
        return forward(chunks)

    want = driver.generate("own", PROMPT)
    monkeypatch.setattr(runner, "forward", failing)
    for _ in range(2 * MAX_CRASHED_STEPS):
        driver.submit("base", PROMPT)
        driver.run()
    assert driver.generate("own", PROMPT) == want


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_mates=st.integers(1, 6),
    place=st.integers(0, 6),
    is_late=st.booleans(),
    length=st.integers(0, 40),
)
def test_others_say_the_same_with_and_without_a_faulty_sequence(
    served: Served, num_mates: int, place: int, is_late: bool, length: int
) -> None:
    driver = served.driver
    want = answers(driver, mates(driver, range(num_mates)))
    prompt = [5] * length + ([] if is_late else [POISON]) + [6]
    params = replace(GREEDY, logit_bias={POISON: 1000.0})
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(driver, monkeypatch)
        ids = mates(driver, range(min(place, num_mates)))
        culprit = driver.submit("half", prompt, params)
        ids += mates(driver, range(len(ids), num_mates))
        driver.run()
    assert [driver.tokens(request_id) for request_id in ids] == want
    assert driver.errors[culprit]["code"] == "engine_failure"


def test_a_sequence_with_nan_fails_alone_and_nothing_of_it_is_cached(
    served: Served, tmp_path: Path
) -> None:
    driver = served.driver
    broken = make_variant(tmp_path / "broken", served.paths["base"], scale=0.1)
    state = load_file(broken / "model.safetensors")
    state["model.embed_tokens.weight"][PROMPT[3], 4] = float("nan")
    save_state(broken, state)
    assert isinstance(driver.load(load_message("broken", broken, donor="base")), ModelLoaded)
    want = answers(driver, mates(driver, range(4)))
    for _ in range(2):
        bad = [driver.submit("broken", PROMPT * 4, params) for params in (GREEDY, SEEDED)]
        assert answers(driver, mates(driver, range(4))) == want
        assert [driver.errors[request_id]["code"] for request_id in bad] == ["numerical_error"] * 2
        assert not any(driver.tokens(request_id) for request_id in bad)
    scheduler = driver.engine.residents.families["base"].scheduler
    hits = scheduler.prefix_hits
    driver.submit("broken", PROMPT * 4)
    driver.run()
    assert scheduler.prefix_hits == hits


@pytest.mark.parametrize("method", ["take", "records"])
def test_prompt_logprobs_that_cannot_be_gathered_fail_their_request_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    driver = served.driver
    want = answers(driver, mates(driver, range(4)))

    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PromptLogprobs, method, failing)
    bad = driver.submit("base", PROMPT, replace(GREEDY, prompt_logprobs=1))
    assert answers(driver, mates(driver, range(4))) == want
    assert driver.errors[bad]["code"] == "engine_failure"
    assert driver.engine.residents.families["base"].cache.num_used_pages == 0


def submit_salted(driver: Driver, request_id: str, salt: str) -> None:
    driver.engine.handle(
        Submit(
            request_id=request_id,
            model="base",
            prompt_ids=tuple(PROMPT * 3),
            sampling=GREEDY,
            cache_salt=salt,
        )
    )
    driver.run()


def test_the_first_token_tells_how_much_of_the_prompt_was_cached(served: Served) -> None:
    driver = served.driver
    for request_id, salt in (("first", "a"), ("again", "a"), ("stranger", "b")):
        submit_salted(driver, request_id, salt)
    cached = {r: [t.num_cached_tokens for t in driver.outputs[r]] for r in driver.outputs}
    # 21 tokens are five full pages of 4; the last token is computed in any case.
    rest = [None] * (GREEDY.max_tokens - 1)
    assert cached == {"first": [0, *rest], "again": [20, *rest], "stranger": [0, *rest]}
    assert len({tuple(driver.tokens(request_id)) for request_id in cached}) == 1
