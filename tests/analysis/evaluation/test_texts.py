"""Texts of a user and their first tokens."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from analysis.evaluation.texts import first_tokens, read_text
from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("texts")
    write_tokenizer(folder, vocab_size=512)
    return Tokenizer.load(folder)


def test_the_first_tokens_of_a_long_text_are_those_of_all_of_it(tokenizer: Tokenizer) -> None:
    text = "The sun rose over the hills. " * 200
    whole = tokenizer.encode(text, add_special_tokens=True)
    assert first_tokens(tokenizer, text, limit=100, vocab_size=512) == whole[:100]
    assert first_tokens(tokenizer, text, limit=10**6, vocab_size=512) == whole


def test_a_text_of_long_tokens_is_read_as_far_as_it_takes() -> None:
    class Long:
        """A token for every fifty characters."""

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert add_special_tokens
            return list(range(len(text) // 50))

    ids = first_tokens(cast(Tokenizer, Long()), "x" * 5000, limit=40, vocab_size=512)
    assert ids == list(range(40))


def test_ids_beyond_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="beyond the model's last, 19"):
        first_tokens(tokenizer, "The sun", limit=10, vocab_size=20)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(InvalidRequestError, match="--wikitext") as refused:
            read_text(path, param="wikitext")
        assert refused.value.param == "wikitext"


def test_a_folder_in_the_place_of_a_text_is_not_told_of_json(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"not a regular file; name one") as refused:
        read_text(tmp_path, param="wikitext")
    assert "JSON" not in refused.value.message
