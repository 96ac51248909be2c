"""Sampling against distributions small enough to work out by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.engine.messages import FinishReason
from linker_core.engine.sampling.choose import Result, Sampled
from linker_core.engine.sampling.sampler import Sampler
from linker_core.engine.sequence import SequenceState
from linker_core.errors import EngineFailureError, InvalidRequestError, NumericalError
from tests.linker_core.engine.sampling.rows import sequence

# Probabilities 0.5, 0.25, 0.15, 0.1 at temperature 1.
LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))


def sample(logits: torch.Tensor, states: Sequence[SequenceState]) -> list[Result]:
    return Sampler().sample(logits, states)


def one(logits: torch.Tensor, state: SequenceState) -> Sampled:
    (result,) = sample(logits.unsqueeze(0), [state])
    assert isinstance(result, Sampled)
    return result


def frequencies(state: SequenceState, *, draws: int = 2000) -> dict[int, float]:
    sampler = Sampler()
    counts: Counter[int] = Counter()
    for _ in range(draws):
        (result,) = sampler.sample(LOGITS.unsqueeze(0), [state])
        assert isinstance(result, Sampled)
        counts[result.token_id] += 1
        # A token's number follows from its place in the answer.
        state.tokens.append(0)
    return {token: count / draws for token, count in counts.items()}


def greedy(logits: list[float], **params: Any) -> int:
    return one(torch.tensor(logits), sequence(temperature=0.0, **params)).token_id


def test_sample_without_limits_draws_from_the_softmax() -> None:
    seen = frequencies(sequence(seed=1))
    for token, want in enumerate([0.5, 0.25, 0.15, 0.1]):
        # Four standard deviations of a proportion over 2,000 draws.
        assert abs(seen[token] - want) < 4 * math.sqrt(want * (1 - want) / 2000)


def test_sample_temperature_sharpens_as_a_power() -> None:
    seen = frequencies(sequence(seed=1, temperature=0.5))
    want = 0.25 / (0.25 + 0.0625 + 0.0225 + 0.01)
    assert abs(seen[0] - want) < 4 * math.sqrt(want * (1 - want) / 2000)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.29}, {0, 1, 2}),
        ({"min_p": 0.31}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of 0.9: 0.556, 0.833
        ({"top_k": 9, "top_p": 0.7}, {0, 1}),
        ({"min_p": 0.29, "top_p": 0.8}, {0, 1}),
        ({"min_p": 0.29, "top_k": 2}, {0, 1}),
    ],
)
def test_sample_limits_keep_exactly_the_allowed_tokens(
    params: dict[str, Any], allowed: set[int]
) -> None:
    assert set(frequencies(sequence(seed=1, **params), draws=400)) == allowed


def test_sample_limits_renormalise_what_is_left() -> None:
    seen = frequencies(sequence(seed=1, top_k=2))
    assert abs(seen[0] - 2 / 3) < 4 * math.sqrt(2 / 9 / 2000)


def test_sample_temperature_zero_and_tiny_take_the_largest() -> None:
    for temperature in (0.0, 1e-7):
        state = sequence(temperature=temperature, logprobs=0)
        assert one(LOGITS, state).token_id == 0


@pytest.mark.parametrize(
    ("logits", "params", "want"),
    [
        # Seen tokens, prompt and output alike: positive ones are divided, negative multiplied.
        ([2.0, 1.5, 0.0], {"prompt": (0,), "repetition_penalty": 2.0}, 1),
        ([2.0, 1.5, 1.2], {"prompt": (0,), "output": (1,), "repetition_penalty": 2.0}, 2),
        ([-1.0, -1.5, -9.0], {"prompt": (0,), "repetition_penalty": 2.0}, 1),
        ([2.0, 1.5, 0.0], {"prompt": (0,), "repetition_penalty": 1.3}, 0),
        # Frequency counts, presence does not; the prompt is no output.
        ([2.0, 1.5, 0.0], {"output": (0,), "frequency_penalty": 0.4}, 0),
        ([2.0, 1.5, 0.0], {"output": (0, 0), "frequency_penalty": 0.4}, 1),
        ([2.0, 1.5, 0.0], {"output": (0, 0), "presence_penalty": 0.4}, 0),
        ([2.0, 1.5, 0.0], {"output": (0, 0), "presence_penalty": 0.6}, 1),
        ([2.0, 1.5, 0.0], {"prompt": (0, 0), "frequency_penalty": 2.0}, 0),
        ([2.0, 1.5, 0.0], {"output": (1,), "presence_penalty": -0.6}, 1),
        ([2.0, 1.5, 0.0], {"logit_bias": {2: 2.5}}, 2),
        ([2.0, 1.5, 0.0], {"logit_bias": {0: -100.0}}, 1),
        ([2.0, 1.5, 0.0], {"allowed_token_ids": frozenset({1, 2})}, 1),
        ([2.0, 1.5, 0.0], {"allowed_token_ids": frozenset({2}), "logit_bias": {0: 9.0}}, 2),
        # Bad words: whole, or what would complete one within the answer.
        ([2.0, 1.5, 0.0], {"bad_words": ((0,), (1,))}, 2),
        ([2.0, 1.5, 0.0], {"output": (2, 1), "bad_words": ((2, 1, 0),)}, 1),
        ([2.0, 1.5, 0.0], {"output": (1,), "bad_words": ((2, 1, 0),)}, 0),
        ([2.0, 1.5, 0.0], {"prompt": (1,), "bad_words": ((1, 0),)}, 0),
        # Stop ids are hidden until the minimum is reached; ids beyond the width do not matter.
        ([2.0, 1.5, 0.0], {"min_tokens": 1, "stop_token_ids": frozenset({0, 7})}, 1),
        ([2.0, 1.5, 0.0], {"min_tokens": 1, "stop_token_ids": frozenset()}, 0),
        (
            [2.0, 1.5, 0.0],
            {"output": (1,), "min_tokens": 1, "stop_token_ids": frozenset({0})},
            0,
        ),
    ],
)
def test_sample_bias_penalties_and_minimum_move_the_greedy_choice(
    logits: list[float], params: dict[str, Any], want: int
) -> None:
    assert greedy(logits, vocab_size=3, **params) == want


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"allowed_token_ids": frozenset({1}), "bad_words": ((1,),)}, "allowed_token_ids"),
        ({"bad_words": ((0,), (1,), (2,), (3,))}, "bad_words"),
    ],
)
def test_sample_row_with_no_token_left_fails_alone(
    params: dict[str, Any], param: str, temperature: float
) -> None:
    states = [
        sequence(temperature=temperature, **params),
        sequence(temperature=temperature, seed=1),
    ]
    dead, alive = sample(LOGITS.repeat(2, 1), states)
    assert isinstance(dead, InvalidRequestError)
    assert dead.param == param
    assert alive == one(LOGITS, states[1])


def test_sampler_forgets_a_sequence_that_has_ended() -> None:
    sampler, state = Sampler(), sequence()
    sampler.sample(LOGITS.unsqueeze(0), [state])
    assert list(sampler._states) == [state]
    sampler.forget(state)
    sampler.forget(state)
    assert not sampler._states


def test_sample_leaves_the_raw_logits_alone() -> None:
    logits = torch.tensor([[2.0, 1.5, 0.0]])
    before = logits.clone()
    sample(logits, [sequence(vocab_size=3, logit_bias={2: 5.0}, temperature=0.0)])
    assert torch.equal(logits, before)


def test_sample_logprobs_are_of_the_raw_distribution() -> None:
    state = sequence(temperature=0.0, logprobs=2, logit_bias={3: 50.0})
    result = one(LOGITS, state)
    assert result.token_id == 3
    assert result.logprob == pytest.approx(math.log(0.1))
    assert [token for token, _ in result.top_logprobs] == [0, 1]
    assert [p for _, p in result.top_logprobs] == pytest.approx([math.log(0.5), math.log(0.25)])


def test_sample_logprobs_zero_reports_the_chosen_token_only() -> None:
    result = one(LOGITS, sequence(temperature=0.0, logprobs=0))
    assert result.logprob == pytest.approx(math.log(0.5))
    assert result.top_logprobs == ()
    assert one(LOGITS, sequence(temperature=0.0)).logprob is None


def test_sample_rows_are_cut_to_their_own_width() -> None:
    # What lies beyond a row's width is another variant's column.
    logits = torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-1.0, -2.0, 0.0, 1.0]])
    for temperature in (0.0, 1.0):
        states = [
            sequence(vocab_size=2, temperature=temperature, top_k=1),
            sequence(vocab_size=4, temperature=temperature, top_k=1),
        ]
        results = sample(logits, states)
        assert [r.token_id for r in results if isinstance(r, Sampled)] == [0, 3]
    cut = one(logits[0], sequence(vocab_size=2, temperature=0.0, logprobs=4))
    assert cut.logprob == pytest.approx(-math.log(1 + math.exp(-1)))
    assert len(cut.top_logprobs) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = bad
    results = sample(logits, [sequence(temperature=temperature, top_k=1) for _ in range(3)])
    assert isinstance(results[1], NumericalError)
    assert results[0] == results[2] == Sampled(0)


def test_sample_row_whose_sum_overflows_is_finite_nevertheless() -> None:
    logits = torch.full((1, 4), 3e38)
    logits[0, 2] = 3.1e38
    assert sample(logits, [sequence(temperature=0.0)]) == [Sampled(2)]


def test_sample_fault_of_one_row_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    # Submissions with such a bias are refused; sampling contains it nevertheless.
    states = [sequence(logit_bias={99: 1.0}), sequence(temperature=0.0)]
    results = sample(LOGITS.repeat(2, 1), states)
    assert isinstance(results[0], EngineFailureError)
    assert results[1] == Sampled(0)
    assert "sampling failed for request r" in caplog.text


@settings(deadline=None)
@given(seed=st.integers(min_value=-(2**63), max_value=2**64 - 1), mates=st.integers(0, 5))
def test_sample_seed_decides_whatever_the_batch_mates(seed: int, mates: int) -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    alone, mixed = sequence(seed=seed), sequence(seed=seed)
    others = [sequence() for _ in range(mates)]
    for _ in range(5):
        want = one(logits[0], alone)
        got = sample(logits[: mates + 1], [mixed, *others])[0]
        assert got == want


def test_sample_without_a_seed_differs_between_sequences() -> None:
    logits = torch.zeros(1000)
    draws = {
        tuple(one(logits, state).token_id for _ in range(4))
        for state in (sequence(vocab_size=1000) for _ in range(8))
    }
    assert len(draws) == 8


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
    temperature=st.floats(1e-4, 2.0),
    top_k=st.none() | st.integers(1, 30),
    top_p=st.floats(1e-6, 1.0, exclude_min=True),
    min_p=st.floats(0.0, 1.0),
)
def test_sample_always_finds_a_token_within_its_limits(
    weights: list[float], temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    logits = torch.tensor(weights)
    state = sequence(
        vocab_size=len(weights), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    token = one(logits, state).token_id
    larger = int((logits > logits[token]).sum())
    assert larger < (top_k or len(weights))
    ratio = float((logits[token] - logits.max()) / temperature)
    assert min_p == 0 or ratio >= math.log(min_p) - 1e-3


def test_sequence_append_says_when_it_is_over() -> None:
    state = sequence(max_tokens=3, stop_token_ids=frozenset({2}))
    assert state.append(1) is None
    assert state.append(2) is FinishReason.STOP
    assert sequence(max_tokens=1).append(1) is FinishReason.LENGTH
    both = sequence(max_tokens=1, stop_token_ids=frozenset({2}))
    assert both.append(2) is FinishReason.STOP
