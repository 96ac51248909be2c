from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.text.files import MAX_FILE_BYTES
from linker_core.text.tokenizer import MAX_ADDED_TOKENS, Tokenizer
from tests.linker_core.text import tokenizers_by_kind as kinds

TEXTS = (
    "",
    "Hello, world!",
    " leading and  double  spaces \n\n\tand tabs",
    "Ünïcödé ワールド 🌍👩‍👩‍👧 ﷽ \x00 \ufffd",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return x ** 2  # 12345 . , ! ?",
)


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    return kinds.save(kinds.byte_level(), tmp_path, eos_token="<|im_end|>")


def test_encode_and_decode_equal_transformers(byte_level: Path) -> None:
    ours = Tokenizer.load(byte_level)
    theirs = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(byte_level / "tokenizer.json")
    )
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_encode_adds_special_tokens_only_when_asked(tmp_path: Path) -> None:
    inner = kinds.byte_level()
    bos = inner.token_to_id("<|endoftext|>")
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    tokenizer = Tokenizer.load(kinds.save(inner, tmp_path))
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello", add_special_tokens=True) == [bos, *plain]


def test_load_ignores_truncation_and_padding_of_the_file(tmp_path: Path) -> None:
    inner = kinds.byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    tokenizer = Tokenizer.load(kinds.save(inner, tmp_path))
    text = "the cat sat on the mat and the world"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_ids_are_the_special_added_tokens(byte_level: Path) -> None:
    tokenizer = Tokenizer.load(byte_level)
    texts = {tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.special_ids}
    assert texts == set(kinds.SPECIAL)
    assert tokenizer.decode(sorted(tokenizer.special_ids)) == ""


def test_num_tokens_counts_added_tokens(byte_level: Path) -> None:
    tokenizer = Tokenizer.load(byte_level)
    [last] = tokenizer.encode("<tool>", add_special_tokens=False)
    assert last == tokenizer.num_tokens - 1
    assert tokenizer.has_token(last)
    assert not tokenizer.has_token(tokenizer.num_tokens)
    assert not tokenizer.has_token(-1)


@pytest.mark.parametrize("form", ["</s>", {"content": "</s>", "lstrip": False}])
def test_eos_token_is_read_in_both_forms(tmp_path: Path, form: object) -> None:
    tokenizer = Tokenizer.load(kinds.save(kinds.byte_fallback(), tmp_path, eos_token=form))
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.bos_token is None


def test_token_text_keeps_the_leading_space(tmp_path: Path) -> None:
    fallback = Tokenizer.load(kinds.save(kinds.byte_fallback(), tmp_path / "a"))
    the = kinds.byte_fallback().token_to_id("▁the")
    assert the is not None
    assert fallback.token_text(the) == " the"
    level = Tokenizer.load(kinds.save(kinds.byte_level(), tmp_path / "b"))
    ids = level.encode("see the cat", add_special_tokens=False)
    assert "".join(map(level.token_text, ids)) == "see the cat"
    assert level.token_text(min(level.special_ids)) in kinds.SPECIAL


def test_encode_half_a_surrogate_pair_is_refused(byte_level: Path) -> None:
    tokenizer = Tokenizer.load(byte_level)
    with pytest.raises(InvalidRequestError, match="character 3"):
        tokenizer.encode("abc\ud83d", add_special_tokens=False)


def damaged(text: str) -> Iterator[str]:
    good = json.loads(text)
    yield "{"
    yield "[]"
    yield "[" * 100_000
    yield "{}"
    yield json.dumps({**good, "model": {"type": "Nonsense"}})
    token = good["added_tokens"][0]
    many = [{**token, "id": i, "content": f"<{i}>"} for i in range(MAX_ADDED_TOKENS + 1)]
    yield json.dumps({**good, "added_tokens": many})
    pattern = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    yield json.dumps({**good, "pre_tokenizer": pattern})


def test_load_damaged_file_is_a_bad_checkpoint(byte_level: Path) -> None:
    for text in damaged((byte_level / "tokenizer.json").read_text()):
        (byte_level / "tokenizer.json").write_text(text)
        with pytest.raises(BadCheckpointError, match=r"tokenizer\.json"):
            Tokenizer.load(byte_level)


def test_load_missing_binary_or_huge_file_is_a_bad_checkpoint(byte_level: Path) -> None:
    path = byte_level / "tokenizer.json"
    with path.open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(BadCheckpointError, match="larger than the 64 MiB"):
        Tokenizer.load(byte_level)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(BadCheckpointError, match="UTF-8"):
        Tokenizer.load(byte_level)
    path.unlink()
    with pytest.raises(BadCheckpointError, match="no such file"):
        Tokenizer.load(byte_level)
    path.mkdir()
    with pytest.raises(BadCheckpointError, match="regular file"):
        Tokenizer.load(byte_level)


def test_load_odd_eos_token_is_a_bad_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match="eos_token"):
        Tokenizer.load(kinds.save(kinds.byte_level(), tmp_path, eos_token=7))


def test_encode_a_pattern_that_backtracks_without_end_is_an_error(tmp_path: Path) -> None:
    """`(a+)+$` makes the regular-expression engine give up, which panics inside `tokenizers`."""
    inner = kinds.byte_level()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), behavior="isolated")
    tokenizer = Tokenizer.load(kinds.save(inner, tmp_path))
    with pytest.raises(InvalidRequestError, match="tokenizer failed"):
        tokenizer.encode("a" * 64 + "!", add_special_tokens=False)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["base", "instruct", "chat", "math", "code"])
def test_mini_qwen2_tokenizers_equal_transformers(shared: Path, name: str) -> None:
    directory = shared / "families" / "mini-qwen2" / name
    # AutoTokenizer takes Qwen's own splitting for every Qwen2 model; `base` says another in its
    # tokenizer.json, with which it was trained. The variants were saved with Qwen's.
    reader = PreTrainedTokenizerFast if name == "base" else AutoTokenizer
    ours, theirs = Tokenizer.load(directory), reader.from_pretrained(directory)
    held_out = (directory.parent / "heldout" / "chat.jsonl").read_text().splitlines()[:20]
    for text in (*TEXTS, *held_out):
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(
                ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )
    assert ours.num_tokens == len(theirs)
    added = theirs.added_tokens_decoder.items()
    assert ours.special_ids == {i for i, token in added if token.special}
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_load_fifo_or_link_is_refused_at_once(byte_level: Path, tmp_path: Path, name: str) -> None:
    file = byte_level / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(BadCheckpointError, match="regular file"):
        Tokenizer.load(byte_level)
    file.unlink()
    secret = tmp_path / "secret"
    secret.write_text("{}")
    file.symlink_to(secret)
    with pytest.raises(BadCheckpointError, match="symbolic link"):
        Tokenizer.load(byte_level)


def test_load_token_declared_beside_but_not_in_the_tokenizer_is_refused(byte_level: Path) -> None:
    declared = {"added_tokens_decoder": {"100000": {"content": "<|new|>", "special": True}}}
    (byte_level / "tokenizer_config.json").write_text(json.dumps(declared))
    with pytest.raises(BadCheckpointError, match="does not hold"):
        Tokenizer.load(byte_level)


def test_load_names_of_special_tokens_from_their_map(byte_level: Path) -> None:
    (byte_level / "tokenizer_config.json").unlink(missing_ok=True)
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (byte_level / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.load(byte_level)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_models_with_the_same_tokenizer_hold_one_while_they_are_known(tmp_path: Path) -> None:
    folders = [
        kinds.save(kinds.byte_level(), tmp_path / str(i), eos_token="<|im_end|>") for i in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(Tokenizer.load, folders)
    assert all(other is first for other in others)
    held = weakref.ref(first)
    del first, others
    gc.collect()
    assert held() is None


def test_another_file_or_another_end_is_another_tokenizer(tmp_path: Path) -> None:
    first = Tokenizer.load(kinds.save(kinds.byte_level(), tmp_path / "a", eos_token="<|im_end|>"))
    ends = Tokenizer.load(kinds.save(kinds.byte_level(), tmp_path / "b"))
    more = kinds.byte_level()
    more.add_tokens(["another"])
    tokens = Tokenizer.load(kinds.save(more, tmp_path / "c", eos_token="<|im_end|>"))
    assert (first.eos_token, ends.eos_token) == ("<|im_end|>", None)
    assert (first.num_tokens, tokens.num_tokens) == (ends.num_tokens, ends.num_tokens + 1)


def test_a_configuration_that_lies_is_refused_though_its_file_is_known(
    byte_level: Path, tmp_path: Path
) -> None:
    known = Tokenizer.load(byte_level)
    declared = {"added_tokens_decoder": {"7": {"content": "<|none|>"}}}
    lying = kinds.save(
        kinds.byte_level(), tmp_path / "lying", eos_token=known.eos_token, **declared
    )
    with pytest.raises(BadCheckpointError, match="declares token"):
        Tokenizer.load(lying)
