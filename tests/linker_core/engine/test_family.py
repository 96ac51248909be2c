"""What a family keeps of its sequences, under traffic of every kind."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from linker_core.engine.messages import Abort, SamplingParams
from tests.linker_core.engine.driving import GREEDY
from tests.linker_core.engine.serving import Served

KINDS = (
    GREEDY,
    SamplingParams(max_tokens=5, temperature=1.0, seed=3, repetition_penalty=1.1),
    replace(GREEDY, prompt_logprobs=1),
    replace(GREEDY, grammar=LLMatcher.grammar_from_regex("[a-f]{6}")),
    replace(GREEDY, grammar="none"),
    replace(GREEDY, bad_words=tuple((token,) for token in range(512))),
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "step", "abort"]),
            st.integers(0, len(KINDS) - 1),
            st.integers(1, 40),
        ),
        max_size=40,
    )
)
def test_nothing_is_kept_of_sequences_that_have_ended(
    served: Served, operations: list[tuple[str, int, int]]
) -> None:
    driver = served.driver
    family = driver.engine.residents.families["base"]
    live: list[str] = []
    for operation, which, number in operations:
        if operation == "submit":
            live.append(driver.submit("half", [number] * number, KINDS[which]))
        elif operation == "step":
            driver.step()
        elif live:
            driver.engine.handle(Abort(request_id=live.pop(number % len(live))))
    driver.run()
    for request_id in live:
        ended = driver.outputs[request_id] and driver.reason(request_id) is not None
        assert bool(ended) != (request_id in driver.errors)
    assert not family._sampler._states
    assert not family._prompt_logprobs
    assert not driver.engine._sequences
    assert driver.engine._grammars.num_pending == 0
    assert family.cache.num_used_pages == 0
