from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from linker_core.text.byte_tokens import ByteTokens
from tests.linker_core.text import tokenizers_by_kind as kinds


def odd_tokens() -> tokenizers.Tokenizer:
    """Tokens that look like the byte alphabet, in part or in whole, and others that do not."""
    inner = kinds.byte_level()
    inner.add_tokens(["\u0120\u00e9", "a b", "\u4e16\u00e9", "\u00e9", "\u0143x"])
    inner.add_special_tokens(["<|\u00e9nd|>", "<| |>"])
    return inner


ODD = odd_tokens()
NUM_TOKENS = ODD.get_vocab_size(with_added_tokens=True)


def joined(ids: list[int]) -> str:
    tokens = ByteTokens(ODD)
    pieces = (tokens[one] for one in ids)
    data = b"".join(one.encode() if isinstance(one, str) else one for one in pieces)
    return data.decode(errors="replace")


@pytest.mark.parametrize("token_id", range(NUM_TOKENS - 8, NUM_TOKENS + 2))
def test_added_token_reads_as_the_decoder_has_it(token_id: int) -> None:
    assert joined([token_id]) == ODD.decode([token_id], skip_special_tokens=False)


@given(st.lists(st.integers(0, NUM_TOKENS + 2), max_size=40))
def test_joined_tokens_are_the_decoding_of_all_of_them(ids: list[int]) -> None:
    assert joined(ids) == ODD.decode(ids, skip_special_tokens=False)


def test_id_that_no_token_has_is_empty_and_not_kept() -> None:
    tokens = ByteTokens(ODD)
    assert (tokens[-1], tokens[NUM_TOKENS + 5]) == ("", "")
    assert not tokens


def test_decoder_that_does_more_is_no_byte_decoder() -> None:
    assert ByteTokens.of(kinds.byte_fallback()) is None
    assert ByteTokens.of(kinds.byte_level()) is not None
