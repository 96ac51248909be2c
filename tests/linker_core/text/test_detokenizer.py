from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.errors import InvalidRequestError
from linker_core.text.detokenizer import Detokenizer
from linker_core.text.tokenizer import Tokenizer
from tests.linker_core.text import tokenizers_by_kind as kinds


@cache
def byte_level() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return Tokenizer.load(kinds.save(kinds.byte_level(), Path(folder)))


@cache
def byte_fallback() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return Tokenizer.load(kinds.save(kinds.byte_fallback(), Path(folder)))


@cache
def single_bytes() -> dict[int, int]:
    """The id of every byte in the byte-level tokenizer."""
    alphabet = kinds.byte_level()
    ids = {}
    for byte in range(256):
        # Latin-1 text of the byte-level alphabet: printable bytes stand for themselves.
        char = chr(byte) if byte in _PRINTABLE else chr(256 + _UNPRINTABLE.index(byte))
        token = alphabet.token_to_id(char)
        assert token is not None
        ids[byte] = token
    return ids


_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


ANY_ID = st.integers(0, byte_level().num_tokens + 3)  # a few ids that no token has
# Bytes that begin, continue or break characters, more often than chance would give them.
BROKEN_BYTE = st.sampled_from([0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF])


@given(st.lists(ANY_ID, max_size=80), st.booleans())
def test_pieces_add_up_to_the_whole_decoding(ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(byte_level(), skip_special_tokens=skip)
    whole = byte_level().decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(detokenizer, ids)) == whole


@given(st.lists(BROKEN_BYTE | st.integers(0, 255), max_size=80))
def test_pieces_of_broken_utf8_add_up_to_the_whole_decoding(data: list[int]) -> None:
    ids = [single_bytes()[byte] for byte in data]
    assert "".join(pieces(Detokenizer(byte_level()), ids)) == bytes(data).decode(errors="replace")


@given(st.text(max_size=60))
def test_pieces_of_byte_fallback_add_up_to_the_whole_decoding(text: str) -> None:
    text = text.replace("\ufffd", "")
    ids = byte_fallback().encode(text, add_special_tokens=False)
    whole = byte_fallback().decode(ids)
    assert "".join(pieces(Detokenizer(byte_fallback()), ids)) == whole


@given(st.lists(st.integers(0, 270), max_size=60))
def test_byte_fallback_of_any_ids_is_whole_where_nothing_is_broken(ids: list[int]) -> None:
    whole = byte_fallback().decode(ids)
    streamed = "".join(pieces(Detokenizer(byte_fallback()), ids))
    if "\ufffd" not in whole:
        assert streamed == whole
    else:
        assert "\ufffd" in streamed


@given(st.text(min_size=1, max_size=60))
@settings(max_examples=50)
def test_complete_characters_are_sent_at_once(text: str) -> None:
    """Only a character that is not complete, or cannot be told from one, waits."""
    text = text.replace("\ufffd", "")
    ids = byte_level().encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(byte_level())
    sent = ""
    for count, token_id in enumerate(ids, start=1):
        sent += detokenizer.push(token_id)
        whole = byte_level().decode(ids[:count], skip_special_tokens=False)
        assert sent == whole.rstrip("\ufffd")


def test_endless_broken_bytes_are_sent_and_not_kept() -> None:
    ids = [single_bytes()[0x80]] * 10_000
    detokenizer = Detokenizer(byte_level())
    sent = sum(len(detokenizer.push(token_id)) for token_id in ids)
    assert sent >= len(ids) - 3
    assert sent + len(detokenizer.finish()) == len(ids)


def test_long_run_of_byte_fallback_characters_is_whole() -> None:
    text = "ខ្មែរ" * 40 + "🌍" * 40
    ids = byte_fallback().encode(text, add_special_tokens=False)
    assert len(ids) > 3 * len(text) - 5
    assert "".join(pieces(Detokenizer(byte_fallback()), ids)) == text


def test_leading_space_between_words_survives_the_window() -> None:
    text = "the a b a b c " * 20
    ids = byte_fallback().encode(text, add_special_tokens=False)
    assert "".join(pieces(Detokenizer(byte_fallback()), ids)) == text


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain way: character by character, the first stop string to be complete ends it."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


STOPS = st.lists(st.text("abc é", min_size=1, max_size=5), min_size=1, max_size=3)


@given(st.text("abc é🌍", max_size=40), STOPS, st.booleans())
@settings(max_examples=300)
def test_stop_strings_never_leak(text: str, stops: list[str], fallback: bool) -> None:
    tokenizer = byte_fallback() if fallback else byte_level()
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected, stopped = cut(tokenizer.decode(ids), stops)
    detokenizer = Detokenizer(tokenizer, stop=stops)
    sent = ""
    for piece in pieces(detokenizer, ids):
        sent += piece
        assert expected.startswith(sent)
    assert sent == expected
    assert detokenizer.stopped == stopped


def test_stop_string_across_tokens_is_cut_and_ends_the_text() -> None:
    ids = byte_level().encode("the cat says hello to the world", add_special_tokens=False)
    detokenizer = Detokenizer(byte_level(), stop=["s hel"])
    assert "".join(pieces(detokenizer, ids)) == "the cat say"
    assert detokenizer.stopped
    assert detokenizer.push(ids[0]) == ""
    assert detokenizer.finish() == ""


def test_stop_string_belongs_to_the_text_if_asked() -> None:
    ids = byte_level().encode("the cat says hello", add_special_tokens=False)
    detokenizer = Detokenizer(byte_level(), stop=["cat s"], include_stop=True)
    assert "".join(pieces(detokenizer, ids)) == "the cat s"


def test_beginning_of_a_stop_string_is_sent_once_it_cannot_be_one() -> None:
    byte_ids = [single_bytes()[byte] for byte in b"aab!"]
    detokenizer = Detokenizer(byte_level(), stop=["aac"])
    assert [detokenizer.push(token_id) for token_id in byte_ids] == ["", "", "aab", "!"]


def held(text: str, stops: list[str]) -> int:
    """The plain way: the longest end of the text that begins a stop string."""
    ends = [text[at:] for at in range(len(text))]
    return max((len(end) for end in ends for stop in stops if stop.startswith(end)), default=0)


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=3),
)
@settings(max_examples=300)
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(byte_level(), stop=stops)
    sent = ""
    for end, char in enumerate(text, start=1):
        sent += detokenizer.push(single_bytes()[ord(char)])
        if detokenizer.stopped:
            break
        assert sent == text[: end - held(text[:end], stops)]


def test_finish_gives_what_was_held_back() -> None:
    detokenizer = Detokenizer(byte_level(), stop=["ab"])
    assert detokenizer.push(single_bytes()[ord("a")]) == ""
    assert detokenizer.push(single_bytes()[0xE2]) == ""
    assert detokenizer.finish() == "a\ufffd"
    assert not detokenizer.stopped


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        Detokenizer(byte_level(), stop=["a", ""])


@pytest.mark.shared
@given(st.data())
@settings(max_examples=100)
def test_mini_qwen2_pieces_add_up_to_the_whole_decoding(shared: Path, data: st.DataObject) -> None:
    tokenizer = Tokenizer.load(shared / "families" / "mini-qwen2" / "base")
    ids = data.draw(st.lists(st.integers(0, tokenizer.num_tokens - 1), max_size=60))
    assert "".join(pieces(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)
