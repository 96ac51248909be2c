"""What is kept between steps is what would be worked out anew from all tokens."""

from __future__ import annotations

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from linker_core.engine.sampling.row_state import RowState
from tests.linker_core.engine.sampling.rows import sequence

TOKENS = st.lists(st.integers(0, 150), max_size=200)


@settings(deadline=None)
@example(prompt=list(range(150)), output=list(range(151)), stride=40)  # more than fit at first
@given(prompt=TOKENS, output=TOKENS, stride=st.integers(1, 40))
def test_counts_kept_up_step_by_step_are_those_of_all_tokens(
    prompt: list[int], output: list[int], stride: int
) -> None:
    state = sequence(prompt=(5, *prompt), vocab_size=151, repetition_penalty=1.1)
    row = RowState(state)
    for first in range(0, len(output) + 1, stride):
        state.tokens += output[first : first + stride]
        counts = row.counts()
        assert counts is not None
        generated = Counter(state.tokens[state.num_prompt :])
        found = dict(zip(counts.ids.tolist(), counts.num_generated.tolist(), strict=True))
        assert found == {token: generated[token] for token in state.tokens}


def test_rows_without_penalties_count_nothing() -> None:
    assert RowState(sequence(logit_bias={1: 1.0})).counts() is None
