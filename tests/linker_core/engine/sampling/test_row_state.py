"""What is kept between steps is what would be worked out anew from all tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

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


@given(
    output=st.lists(st.integers(0, 3), max_size=8),
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=4),
)
def test_a_bad_word_bans_its_last_token_where_the_answer_ends_with_the_others(
    output: list[int], words: list[tuple[int, ...]]
) -> None:
    # The prompt would begin some of the words; it is not part of the answer.
    state = sequence(prompt=(0, 1, 2, 3), output=tuple(output), bad_words=tuple(words))
    banned = {int(token) for ids in RowState(state).banned() for token in ids}
    assert banned == {
        w[-1]
        for w in words
        if output[len(output) + 1 - len(w) :] == [*w[:-1]] and len(output) >= len(w) - 1
    }


def test_bad_words_look_at_no_more_of_an_answer_than_they_need() -> None:
    class Watched(list[int]):
        longest = 0

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            if isinstance(key, slice):
                Watched.longest = max(Watched.longest, len(found))
            return found

    state = sequence(output=(1,) * 1000, bad_words=((1, 1, 2), (1, 3)))
    state.tokens = Watched(state.tokens)
    assert sorted(token for ids in RowState(state).banned() for token in ids.tolist()) == [2, 3]
    assert Watched.longest == 2
