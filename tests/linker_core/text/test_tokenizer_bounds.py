from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from linker_core.errors import BadCheckpointError
from linker_core.text.tokenizer_bounds import check_bounded, is_linear, max_token_chars
from tests.linker_core.text import tokenizers_by_kind as kinds
from tests.tiny import byte_level_tokenizer


def record(inner: tokenizers.Tokenizer) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(inner.to_str())
    return parsed


def charsmap(*texts: str) -> Mapping[str, object]:
    """SentencePiece's map with an empty trie."""
    data = (0).to_bytes(4, "little") + b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def replace(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def sequence(part: str, *steps: Mapping[str, object]) -> dict[str, Any]:
    return {"type": "Sequence", part: list(steps)}


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFC"},
        sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
        sequence("normalizers", charsmap("صلى الله عليه وسلم"), replace(" {2,}", "▁", "Regex")),
        sequence("normalizers", *[replace("``", '"'), replace("''", '"')] * 9),
        replace("x", "y" * 64),
    ],
)
def test_steps_that_models_have_are_taken(normalizer: object) -> None:
    check_bounded({"normalizer": normalizer})


@pytest.mark.parametrize(
    "normalizer",
    [
        replace("x", "y" * 65),
        replace("", "y" * 65),
        replace("x?", "y" * 64, "Regex"),
        sequence("normalizers", replace("a", "b" * 9), replace("b", "c" * 9)),
        sequence("normalizers", sequence("normalizers", *[replace("a", "aa")] * 7)),
        {"type": "Prepend", "prepend": "x" * 65},
        charsmap("a", "b" * 65),
        {"type": "Precompiled", "precompiled_charsmap": "not base64!"},
    ],
)
@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_steps_that_make_much_of_little_are_refused(part: str, normalizer: object) -> None:
    with pytest.raises(BadCheckpointError, match=r"tokenizer\.json"):
        check_bounded({part: normalizer})


def test_tokens_added_to_every_text_are_bounded() -> None:
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [piece] * 65, "pair": []}
    with pytest.raises(BadCheckpointError, match="65 tokens"):
        check_bounded({"post_processor": sequence("processors", processor)})
    check_bounded({"post_processor": processor | {"single": [piece] * 64}})


@pytest.mark.parametrize(
    "odd", [[], 7, "x", {"type": []}, {"type": "Sequence", "normalizers": 7}, {"type": "Replace"}]
)
def test_odd_records_are_left_to_the_library(odd: object) -> None:
    check_bounded({"normalizer": odd, "post_processor": odd, "decoder": odd})
    assert max_token_chars({"model": odd, "normalizer": odd, "added_tokens": odd}) is None


def test_token_of_bytes_stands_for_as_many_characters_at_most() -> None:
    inner = byte_level_tokenizer(512)
    assert max_token_chars(record(inner)) == len("<|endoftext|>")
    inner.add_tokens(["x" * 40])
    assert max_token_chars(record(inner)) == 40
    inner.normalizer = normalizers.NFC()
    assert max_token_chars(record(inner)) == 160


def unbounded() -> dict[str, dict[str, Any]]:
    lossless = record(byte_level_tokenizer(512))
    [token, *others] = lossless["added_tokens"]
    vocabulary = dict(lossless["model"]["vocab"])
    del vocabulary["a"]
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    fallback = record(kinds.byte_fallback())
    return {
        "strips": lossless | {"normalizer": {"type": "Strip"}},
        "replaces patterns": lossless | {"normalizer": replace(" +", " ", "Regex")},
        "takes out": lossless | {"normalizer": replace("a", "")},
        "splits at spaces": lossless | {"pre_tokenizer": {"type": "Whitespace"}},
        "removes": lossless
        | {"pre_tokenizer": sequence("pretokenizers", split, {"type": "ByteLevel"})},
        "swallows spaces": lossless | {"added_tokens": [token | {"rstrip": True}, *others]},
        "drops letters": lossless | {"model": lossless["model"] | {"vocab": vocabulary}},
        "no fallback": fallback | {"model": fallback["model"] | {"byte_fallback": False}},
        "words": lossless | {"model": {"type": "WordLevel", "vocab": {"a": 0}}},
    }


@pytest.mark.parametrize("kind", unbounded())
def test_tokenizer_that_can_lose_characters_has_no_bound(kind: str) -> None:
    assert max_token_chars(unbounded()[kind]) is None


@pytest.mark.parametrize("inner", [kinds.byte_level(), kinds.byte_fallback()])
@settings(max_examples=60)
@given(text=st.text(max_size=200))
def test_text_has_as_many_tokens_as_its_characters_ask_for(
    inner: tokenizers.Tokenizer, text: str
) -> None:
    most = max_token_chars(record(inner))
    assert most is not None
    assert len(inner.encode(text, add_special_tokens=False).ids) * most >= len(text)


def test_steps_of_a_built_tokenizer_are_read_as_the_library_writes_them() -> None:
    inner = kinds.byte_fallback()
    inner.normalizer = normalizers.Sequence([normalizers.Replace("a", "b" * 100)])
    with pytest.raises(BadCheckpointError, match="normalizer"):
        check_bounded(record(inner))
    inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " " * 100)])
    with pytest.raises(BadCheckpointError, match="decoder"):
        check_bounded(record(inner))
    inner.decoder = decoders.ByteFallback()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single=["<s>"] * 100 + ["$A"], special_tokens=[("<s>", 1)]
    )
    with pytest.raises(BadCheckpointError, match="post_processor"):
        check_bounded(record(inner))


LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def bpe(**parts: object) -> dict[str, object]:
    return {"model": {"type": "BPE"}, **parts}


@pytest.mark.parametrize(
    "linear",
    [
        bpe(pre_tokenizer={"type": "ByteLevel", "use_regex": True}),
        bpe(
            normalizer={"type": "NFC"}, pre_tokenizer=sequence("pretokenizers", split(LLAMA_SPLIT))
        ),
        bpe(
            normalizer=sequence(
                "normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")
            )
        ),
    ],
)
def test_what_takes_time_in_proportion_to_a_text(linear: dict[str, object]) -> None:
    assert is_linear(linear)


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"type": "WordPiece"}},
        {},
        bpe(pre_tokenizer=split("(a+)+$")),
        bpe(pre_tokenizer=sequence("pretokenizers", {"type": "ByteLevel"}, split("a*a*a*b"))),
        bpe(normalizer=replace("(a+)+$", "", "Regex")),
        bpe(normalizer=replace("x", "y" * 64)),
        bpe(pre_tokenizer={"type": "New"}),
    ],
)
def test_what_may_take_longer(other: dict[str, object]) -> None:
    assert not is_linear(other)
