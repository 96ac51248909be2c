"""Log-probabilities of the prompt are those of transformers, however the prompt is computed."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.engine import messages
from linker_core.engine.messages import PromptLogprob, SamplingParams
from linker_core.engine.prompt_logprobs import PromptLogprobs
from linker_core.engine.sampling import logprobs
from linker_core.errors import NumericalError
from tests.linker_core.engine.driving import GREEDY, SMALL, Driver
from tests.linker_core.engine.families import reference_logits
from tests.linker_core.engine.sampling.rows import sequence
from tests.linker_core.engine.serving import PROMPT, Served, serve_three

LONG = [*PROMPT, *range(60, 90), *PROMPT]  # longer than the rows of a step
ASKING = replace(GREEDY, max_tokens=3, prompt_logprobs=2)


def records(driver: Driver, request_id: str) -> tuple[PromptLogprob, ...]:
    first, *rest = driver.outputs[request_id]
    assert all(token.prompt_logprobs is None for token in rest)
    assert first.prompt_logprobs is not None
    return tuple(first.prompt_logprobs)


def assert_right(
    served: Served, model: str, prompt: list[int], got: tuple[PromptLogprob, ...]
) -> None:
    want = torch.log_softmax(reference_logits(served.references[model], prompt), dim=1)
    assert [record.token_id for record in got] == prompt[1:]
    for position, record in enumerate(got):
        row = want[position]
        assert record.logprob == pytest.approx(float(row[record.token_id]), abs=1e-3)
        assert record.rank == 1 + int((row > row[record.token_id]).sum())
        top = row.topk(2)
        assert [token for token, _ in record.top_logprobs] == top.indices.tolist()
        assert [p for _, p in record.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("model", ["base", "own"])
def test_prompt_logprobs_over_several_chunks_are_those_of_transformers(
    served: Served, model: str
) -> None:
    driver = served.driver
    ids = [driver.submit(model, LONG, ASKING) for _ in range(2)]
    plain = driver.submit("half", LONG)
    driver.run()
    for request_id in ids:
        assert_right(served, model, LONG, records(driver, request_id))
    assert all(token.prompt_logprobs is None for token in driver.outputs[plain])
    assert driver.tokens(ids[0]) == driver.generate(model, LONG, replace(GREEDY, max_tokens=3))


def test_prompt_logprobs_do_not_miss_what_the_prefix_cache_holds(served: Served) -> None:
    driver = served.driver
    driver.generate("base", LONG)
    request_id = driver.submit("base", LONG, ASKING)
    driver.run()
    assert_right(served, "base", LONG, records(driver, request_id))


def test_prompt_logprobs_survive_preemption(tmp_path: Path) -> None:
    served = serve_three(tmp_path, "qwen2", replace(SMALL, kv_cache_tokens=100))
    driver = served.driver
    ids = [driver.submit("own", LONG, replace(ASKING, max_tokens=25)) for _ in range(3)]
    driver.run()
    assert driver.engine.residents.families["base"].scheduler.num_preemptions > 0
    for request_id in ids:
        assert_right(served, "own", LONG, records(driver, request_id))
    assert not driver.engine.residents.families["base"]._prompt_logprobs


def test_prompt_logprobs_of_a_single_token_are_empty(served: Served) -> None:
    request_id = served.driver.submit("base", [7], ASKING)
    served.driver.run()
    assert records(served.driver, request_id) == ()


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(1, 39), max_size=6),
    again=st.integers(0, 39),
    num_top=st.integers(0, 5),
    wide=st.booleans(),
)
def test_prompt_logprobs_are_the_same_however_the_rows_come(
    cuts: list[int], again: int, num_top: int, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(len(cuts))
    prompt = torch.randint(0, 60, (40,), generator=generator).tolist()
    logits = torch.randn(40, 70, generator=generator)
    params = SamplingParams(max_tokens=1, prompt_logprobs=num_top)
    state = sequence(prompt=tuple(prompt), vocab_size=70 if wide else 64)
    state.sampling = params
    whole, parts = PromptLogprobs(state), PromptLogprobs(state)
    whole.take(0, logits)
    edges = sorted({0, 40, *cuts})
    for first, end in itertools.pairwise(edges):
        parts.take(first, logits[first:end])
    parts.take(again, logits[again:])  # as after a preemption
    assert list(parts.records()) == list(whole.records())
    assert all(len(record.top_logprobs) == num_top for record in parts.records())


def test_score_works_in_slices_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 70, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(40)
    whole = logprobs.score(logits, tokens, 3, with_ranks=True)
    widest: list[int] = []
    log_softmax = torch.log_softmax

    def watched(part: torch.Tensor, *, dim: int) -> torch.Tensor:
        widest.append(part.numel() * 4)
        return log_softmax(part, dim=dim)

    monkeypatch.setattr(torch, "log_softmax", watched)
    monkeypatch.setattr(logprobs, "SLICE_BYTES", 1000)
    parts = logprobs.score(logits, tokens, 3, with_ranks=True)
    assert max(widest) <= 1000
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_scores_of_a_long_prompt_are_the_same_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    state = sequence(prompt=tuple(range(40)), vocab_size=70)
    state.sampling = SamplingParams(max_tokens=1, prompt_logprobs=3)
    gathered = PromptLogprobs(state)
    gathered.take(0, torch.randn(40, 70, generator=torch.Generator().manual_seed(2)))
    whole = list(gathered.records())
    monkeypatch.setattr(messages, "_ENTRIES_AT_ONCE", 7)
    assert list(pickle.loads(pickle.dumps(gathered.records()))) == whole
    assert [entry.token_id for entry in whole] == list(range(1, 40))


def test_a_prompt_row_without_a_finite_logprob_is_a_numerical_error() -> None:
    state = sequence(prompt=(1, 2, 3), vocab_size=5)
    state.sampling = SamplingParams(max_tokens=1, prompt_logprobs=1)
    logits = torch.zeros(3, 5)
    logits[1, 3] = torch.nan
    with pytest.raises(NumericalError):
        PromptLogprobs(state).take(0, logits)
