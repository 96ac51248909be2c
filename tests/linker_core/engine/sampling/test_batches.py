"""Many rows at once: each is chosen as the plain path chooses it, and as if it were alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.engine.messages import SamplingParams
from linker_core.engine.sampling import choose as choose_module
from linker_core.engine.sampling.choose import Result, Sampled
from linker_core.engine.sampling.draw import draw
from linker_core.engine.sampling.row_state import RowState
from linker_core.engine.sampling.sampler import Sampler
from linker_core.engine.sampling.uniform import uniforms
from linker_core.engine.sequence import SequenceState
from linker_core.errors import EngineFailureError, NumericalError
from tests.linker_core.engine.sampling.plain import plain_chances, plain_choice
from tests.linker_core.engine.sampling.rows import sequence

WIDTH = 300
EDGE = 1e-6  # a number closer than this to another token's share may fall either way
TOKENS = st.integers(0, WIDTH - 20)


@st.composite
def sequences(draw_from: st.DrawFn) -> SequenceState:
    """Sequences with any mixture of parameters and either of two widths."""
    optional: dict[str, st.SearchStrategy[Any]] = {
        "top_k": st.integers(1, 2 * WIDTH),
        "top_p": st.floats(1e-3, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-5.0, 5.0), max_size=4),
        "min_tokens": st.integers(0, 5),
        "stop_token_ids": st.frozensets(TOKENS, max_size=3),
        "allowed_token_ids": st.frozensets(TOKENS, min_size=8),
        "bad_words": st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=3).map(
            tuple
        ),
        "logprobs": st.integers(0, 5),
    }
    params = draw_from(st.fixed_dictionaries({}, optional=optional))
    return sequence(
        prompt=tuple(draw_from(st.lists(TOKENS, min_size=1, max_size=6))),
        output=tuple(draw_from(st.lists(TOKENS, max_size=6))),
        vocab_size=draw_from(st.sampled_from([WIDTH, WIDTH - 17])),
        temperature=draw_from(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        seed=draw_from(st.integers(0, 2**64 - 1)),
        **params,
    )


def logits_of(states: list[SequenceState], seed: int, *, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(states), WIDTH, generator=generator)
    for row, state in enumerate(states):
        logits[row, state.vocab_size :] = 0.0
    return logits


def uniform(state: SequenceState) -> float:
    return float(uniforms([state.sampling.seed or 0], [state.num_output])[0])


@settings(deadline=None)
@given(states=st.lists(sequences(), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_sample_chooses_what_the_plain_path_chooses(states: list[SequenceState], seed: int) -> None:
    logits = logits_of(states, seed)
    for row, (result, state) in enumerate(
        zip(Sampler().sample(logits, states), states, strict=True)
    ):
        assert isinstance(result, Sampled)
        assert result.token_id in plain_choices(logits[row, : state.vocab_size].tolist(), state)


def plain_choices(logits: list[float], state: SequenceState) -> set[int]:
    """What the plain path chooses, with limits and number a rounding error lower and higher."""
    number, choices = uniform(state), set()
    params = state.sampling
    for off in (1 - EDGE, 1.0, 1 + EDGE):
        state.sampling = replace(
            params, top_p=min(params.top_p * off, 1.0), min_p=params.min_p * off
        )
        chances = plain_chances(logits, state)
        choices |= {plain_choice(chances, number + shift)[0] for shift in (-EDGE, 0.0, EDGE)}
    state.sampling = params
    return choices


@settings(deadline=None)
@given(
    states=st.lists(sequences(), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
    shuffle=st.randoms(use_true_random=False),
)
def test_sample_gives_each_row_what_it_gets_alone_bit_by_bit(
    states: list[SequenceState], seed: int, shuffle: random.Random
) -> None:
    logits = logits_of(states, seed)
    alone = [
        Sampler().sample(logits[row : row + 1, : state.vocab_size], [state])[0]
        for row, state in enumerate(states)
    ]
    order = list(range(len(states)))
    for _ in range(3):
        shuffle.shuffle(order)
        some = order[: shuffle.randint(1, len(order))]
        together = Sampler().sample(logits[some], [states[row] for row in some])
        assert together == [alone[row] for row in some]


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("top_p", [0.02, 0.9, 0.9999])
def test_draw_of_wide_rows_is_exact_however_flat_they_are(scale: float, top_p: float) -> None:
    # Flat rows need many candidates, at last all of them; a large top-k stays its own row's.
    width, num_rows = 4096, 12
    logits = scale * torch.randn(num_rows, width, generator=torch.Generator().manual_seed(3))
    states = [
        sequence(vocab_size=width, seed=row, top_p=top_p, top_k=(None, 2000, 30)[row % 3])
        for row in range(num_rows)
    ]
    numbers = torch.from_numpy(uniforms(list(range(num_rows)), [0] * num_rows))
    tokens = draw(logits.clone(), [state.sampling for state in states], numbers)
    for row, state in enumerate(states):
        chances = plain_chances(logits[row].tolist(), state)
        want, margin = plain_choice(chances, float(numbers[row]))
        assert int(tokens[row]) == want or margin < EDGE


def test_sample_of_equal_scores_takes_the_lower_ids_first() -> None:
    width = 1000
    states = [sequence(vocab_size=width, seed=seed, top_k=5) for seed in range(40)]
    results = Sampler().sample(torch.zeros(40, width), states)
    assert {r.token_id for r in results if isinstance(r, Sampled)} == set(range(5))
    listed = Sampler().sample(torch.zeros(1, width), [sequence(vocab_size=width, logprobs=3)])[0]
    assert isinstance(listed, Sampled)
    assert [token for token, _ in listed.top_logprobs] == [0, 1, 2]


@settings(deadline=None)
@given(
    states=st.lists(sequences(), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
    victim=st.integers(0, 4),
    is_fault=st.booleans(),
)
def test_sample_gives_the_others_the_same_with_and_without_a_faulty_row(
    states: list[SequenceState], seed: int, victim: int, is_fault: bool
) -> None:
    victim %= len(states)
    logits = logits_of(states, seed)
    want = Sampler().sample(logits, states)
    faulty = states.copy()
    if is_fault:
        # No submission gets so far with such a bias; sampling contains it nevertheless.
        faulty[victim] = sequence(vocab_size=WIDTH, logit_bias={10**9: 1.0})
    else:
        logits[victim, 3] = torch.nan
    got = Sampler().sample(logits, faulty)
    assert isinstance(got[victim], EngineFailureError if is_fault else NumericalError)
    del got[victim], want[victim]
    assert got == want


def test_sample_falls_back_to_single_rows_when_the_batch_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose_special = choose_module._choose_special

    def poisoned(
        logits: torch.Tensor, rows: list[int], states: list[RowState], *rest: Any
    ) -> list[Result]:
        if any(state.params.seed == 13 for state in states):
            raise MemoryError
        return choose_special(logits, rows, states, *rest)

    monkeypatch.setattr(choose_module, "_choose_special", poisoned)
    states = [sequence(seed=seed, temperature=2.0) for seed in (1, 13, 2)]
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    results = Sampler().sample(logits, states)
    assert isinstance(results[1], EngineFailureError)
    want = [Sampler().sample(logits[[row]], [states[row]])[0] for row in (0, 2)]
    assert [results[0], results[2]] == want
    assert "sampling failed for request r" in caplog.text


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, None), (0.999999, None), (0.7, 3000)])
def test_draw_from_spread_scores_is_the_draw_from_the_sorted_ones(
    top_p: float, top_k: int | None
) -> None:
    # Many scores are equal, a few cannot be chosen, and no row is settled by its largest scores.
    width, num_rows = 20_032, 8
    generator = torch.Generator().manual_seed(1)
    scores = (torch.randn(num_rows, width, generator=generator) * 8).round() / 8
    scores -= scores.amax(dim=1, keepdim=True)
    scores[:, ::7] = -torch.inf
    params = SamplingParams(max_tokens=1, top_p=top_p, top_k=top_k)
    numbers = torch.rand(num_rows, dtype=torch.float64, generator=generator)
    tokens = draw(scores.clone(), [params] * num_rows, numbers)
    for row in range(num_rows):
        ids = scores[row].argsort(descending=True, stable=True)[:top_k]
        weights = scores[row][ids].double().exp()
        reached = (weights.cumsum(0) < top_p * weights.sum()).sum() + 1
        shares = weights[:reached].cumsum(0) / weights[:reached].sum()
        assert tokens[row] == ids[(shares <= numbers[row]).sum()]
