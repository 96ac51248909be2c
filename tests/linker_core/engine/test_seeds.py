"""A seed gives one answer, whatever happens around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linker_core.engine.messages import SamplingParams
from tests.linker_core.engine.driving import SMALL
from tests.linker_core.engine.serving import PROMPT, Served, serve_three

ODD = SamplingParams(
    max_tokens=20,
    temperature=1.2,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    bad_words=((17,), (5, 8)),
    logprobs=2,
)
SEEDED = (
    replace(ODD, top_p=1.0, min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0),
    replace(ODD, top_k=20),
    ODD,
    replace(ODD, allowed_token_ids=frozenset(range(3, 200)), logprobs=None),
)


def submit_all(served: Served) -> list[str]:
    return [
        served.driver.submit("own", [*PROMPT, number], replace(params, seed=number))
        for number, params in enumerate(SEEDED)
    ]


def test_seeds_give_the_same_answers_through_preemption(tmp_path: Path) -> None:
    roomy = serve_three(tmp_path / "roomy", "qwen2")
    # Four sequences of 28 tokens at the end in 17 pages of 4 tokens: they cannot all stay.
    tight = serve_three(tmp_path / "tight", "qwen2", replace(SMALL, kv_cache_tokens=68))
    answers = []
    for served in (roomy, tight):
        ids = submit_all(served)
        served.driver.run()
        answers.append([served.driver.outputs[request_id] for request_id in ids])
    assert tight.driver.engine.residents.families["base"].scheduler.num_preemptions > 0
    for want, got in zip(*answers, strict=True):
        assert [token.token_id for token in got] == [token.token_id for token in want]
        assert [token.logprob for token in got] == [token.logprob for token in want]
        assert [token.top_logprobs for token in got] == [token.top_logprobs for token in want]
        assert len(got) == 20


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    mates=st.lists(
        st.tuples(st.sampled_from(["base", "own", "half"]), st.integers(1, 30), st.integers(0, 3)),
        max_size=4,
    ),
    delay=st.integers(0, 3),
)
def test_seeds_give_the_same_answers_in_any_batch(
    served: Served, mates: list[tuple[str, int, int]], delay: int
) -> None:
    driver = served.driver
    alone = [
        driver.generate("own", [*PROMPT, number], replace(params, seed=number))
        for number, params in enumerate(SEEDED)
    ]
    for model, length, which in mates:
        driver.submit(model, [9] * length, SEEDED[which])
    for _ in range(delay):
        driver.step()
    ids = submit_all(served)
    driver.run()
    assert [driver.tokens(request_id) for request_id in ids] == alone
