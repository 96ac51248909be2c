from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.calibration import (
    CalibrationPrompt,
    CalibrationText,
    encode,
    prompts_only,
    with_answers,
)
from linker_core.tuning.dialogues import Dialogue, Turn, load_dialogues, text_digests
from linker_core.tuning.reading import VariantReader
from linker_core.weights.checkpoint import Checkpoint
from tests import tiny
from tests.templates import compiled, compiled_in


def reader_of(directory: Path) -> VariantReader:
    checkpoint = Checkpoint.open(directory)
    return VariantReader(
        tokenizer=Tokenizer.load(directory),
        template=compiled_in(directory),
        eos_token_ids=checkpoint.eos_token_ids,
        vocab_size=checkpoint.config.vocab_size,
    )


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> VariantReader:
    return reader_of(tiny.make_checkpoint(tmp_path_factory.mktemp("calibration") / "model"))


def said(question: str, answer: str, *, given: bool = False, kind: str = "talk") -> Dialogue:
    turns = (Turn(role="user", content=question), Turn(role="assistant", content=answer))
    return Dialogue(turns=turns, kind=kind, given=given)


def many(
    count: int, *, given: bool = False, answer: str = "yes, of course", kind: str = "talk"
) -> list[Dialogue]:
    source = "Given" if given else "Shipped"
    return [
        said(f"{source} question {n} of {kind}?", answer, given=given, kind=kind)
        for n in range(count)
    ]


def count(text: CalibrationText, dialogues: list[Dialogue]) -> int:
    digests = {dialogue.digest for dialogue in dialogues}
    return sum(
        len(span) for s in text.sequences if s.text_digest in digests for span in s.responses
    )


def test_encode_counts_the_tokens_it_marks(reader: VariantReader) -> None:
    text = encode(load_dialogues(None), reader)
    assert text.num_response_tokens == count(text, load_dialogues(None))
    assert 4_600 <= text.num_response_tokens < 4_600 + 512
    for sequence in text.sequences:
        assert len(sequence.token_ids) <= 512
        assert all(0 <= token_id < 512 for token_id in sequence.token_ids)
        positions = [position for span in sequence.responses for position in span]
        assert positions == sorted(set(positions))
        assert 1 <= positions[0] <= positions[-1] < len(sequence.token_ids)


def test_encode_stops_after_the_sequence_that_reaches_the_limit(reader: VariantReader) -> None:
    length = count(encode(many(1), reader), many(1))
    for limit in (3 * length - 1, 3 * length):
        assert len(encode(many(9), reader, max_response_tokens=limit).sequences) == 3
    assert len(encode(many(9), reader, max_response_tokens=3 * length + 1).sequences) == 4


def test_encode_takes_the_same_dialogues_whatever_the_files_order(reader: VariantReader) -> None:
    dialogues = many(40)
    text = encode(dialogues, reader, max_response_tokens=100)
    assert text == encode(dialogues[::-1], reader, max_response_tokens=100)
    assert [s.text_digest for s in text.sequences] != [
        dialogue.digest for dialogue in dialogues[: len(text.sequences)]
    ]


def test_digest_says_on_which_tokens_and_spans_a_price_was_measured(reader: VariantReader) -> None:
    text = encode(many(3), reader)
    assert text.digest == encode(many(3), reader).digest
    assert text.digest != encode(many(2), reader).digest
    assert text.digest != encode(many(3), replace(reader, template=None)).digest
    prompt = CalibrationPrompt(token_ids=(1, 2), kind="a", text_digest="")
    longer = CalibrationPrompt(token_ids=(1, 2, 3), kind="a", text_digest="")
    assert with_answers([prompt], [(3, 4)]).digest != with_answers([longer], [(4,)]).digest
    other = replace(prompt, kind="b")
    assert with_answers([prompt], [(3, 4)]).digest != with_answers([other], [(3, 4)]).digest


def tokens_by_kind(text: CalibrationText) -> dict[str, int]:
    found: dict[str, int] = {}
    for sequence in text.sequences:
        found[sequence.kind] = found.get(sequence.kind, 0) + sum(map(len, sequence.responses))
    return found


def test_kinds_get_equal_shares_of_the_tokens(reader: VariantReader) -> None:
    short, long = many(120, kind="a", answer="no"), many(9, kind="b", answer="because " * 9)
    text = encode([*short, *long], reader, max_response_tokens=400)
    tokens = tokens_by_kind(text)
    longest = max(len(span) for sequence in text.sequences for span in sequence.responses)
    assert longest > 40  # so that shares by dialogues would be far from equal
    assert abs(tokens["a"] - tokens["b"]) <= longest
    assert sum(tokens.values()) == text.num_response_tokens


def test_kind_that_is_used_up_leaves_its_share_to_the_others(reader: VariantReader) -> None:
    few = many(2, kind="a")
    text = encode([*few, *many(90, kind="b"), *many(90, kind="c")], reader, max_response_tokens=600)
    tokens = tokens_by_kind(text)
    assert tokens["a"] == encode(few, reader).num_response_tokens
    assert abs(tokens["b"] - tokens["c"]) <= 20
    assert 600 <= text.num_response_tokens <= 620


def test_shipped_kinds_are_all_read_enough_to_be_held_against(reader: VariantReader) -> None:
    tokens = tokens_by_kind(encode(load_dialogues(None), reader))
    assert len(tokens) == 4
    assert min(tokens.values()) >= 800


def test_kind_follows_a_dialogue_into_its_own_answer(reader: VariantReader) -> None:
    prompts = prompts_only([*many(1, kind="a"), *many(1, kind="b")], reader)
    text = with_answers(prompts, [(7,), (8,)])
    assert sorted(sequence.kind for sequence in text.sequences) == ["a", "b"]
    assert [sequence.kind for sequence in text.sequences] == [prompt.kind for prompt in prompts]


def test_given_dialogues_take_half_of_the_tokens_where_they_have_as_many(
    reader: VariantReader,
) -> None:
    given, shipped = many(50, given=True), many(90, answer="no")
    text = encode([*given, *shipped], reader, max_response_tokens=400)
    assert text.sequences[0].text_digest in {dialogue.digest for dialogue in given}
    assert 200 <= count(text, given) <= 220
    assert 400 <= text.num_response_tokens <= 420


def test_given_dialogues_that_are_few_are_all_taken(reader: VariantReader) -> None:
    given, shipped = many(2, given=True), many(50)
    text = encode([*given, *shipped], reader, max_response_tokens=400)
    assert count(text, given) == encode(given, reader).num_response_tokens
    assert text.num_response_tokens >= 400


def test_dialogues_that_the_template_refuses_are_left_out(reader: VariantReader) -> None:
    system = Dialogue(
        turns=(Turn(role="system", content="Be brief."), *said("Q?", "A.").turns), kind="talk"
    )
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    picky = replace(reader, template=compiled(strict + tiny.CHATML))
    text = encode([*many(2), system], picky)
    assert system.digest not in {sequence.text_digest for sequence in text.sequences}
    assert len(text.sequences) == len(prompts_only([*many(2), system], picky)) == 2
    for refused in (encode, prompts_only):
        with pytest.raises(InvalidRequestError, match="no system") as caught:
            refused([system], picky)
        assert caught.value.param == "calibration"


def test_given_dialogues_of_which_none_is_usable_are_refused(reader: VariantReader) -> None:
    """Pricing on the shipped dialogues alone would pass over the user's file in silence."""
    long = (Turn(role="user", content="why " * 900), *many(1)[0].turns)
    given = Dialogue(turns=long, kind="talk", given=True)
    with pytest.raises(InvalidRequestError, match="no answer begins"):
        encode([given, *many(3)], reader)


def test_own_answers_are_marked_after_their_prompts(reader: VariantReader) -> None:
    prompts = prompts_only(many(3), reader)
    assert [reader.tokenizer.decode(prompt.token_ids).splitlines()[0] for prompt in prompts] == [
        "user"
    ] * 3
    text = with_answers(prompts, [(7, 8, 2), (), (9,)])
    first, last = text.sequences
    assert first.token_ids == (*prompts[0].token_ids, 7, 8, 2)
    assert first.responses == (range(len(prompts[0].token_ids), len(prompts[0].token_ids) + 3),)
    assert (last.text_digest, last.token_ids[-1]) == (prompts[2].text_digest, 9)
    assert text.num_response_tokens == 4


def test_prompts_of_a_user_and_shipped_ones_take_turns(reader: VariantReader) -> None:
    given = many(2, given=True)
    text = Turn(role="assistant", content="text")
    plain = Dialogue(turns=(text,), kind="talk", plain=True, given=True)
    long = said("why " * 300, "because", given=True)
    prompts = prompts_only([*given, plain, long, *many(4)], reader)
    own = {dialogue.digest for dialogue in given}
    assert [prompt.text_digest in own for prompt in prompts] == [
        True, False, True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(InvalidRequestError, match="plain texts"):
        prompts_only([plain], reader)
    with pytest.raises(InvalidRequestError, match="expected 1 to 256"):
        prompts_only([long], reader)


@pytest.mark.shared
def test_shipped_dialogues_are_not_held_out(shared: Path) -> None:
    held_out: set[str] = set()
    files = sorted((shared / "families" / "mini-qwen2" / "heldout").glob("*.jsonl"))
    for file in files:
        rows = [dialogue for dialogue in load_dialogues(file) if dialogue.given]
        assert len(rows) >= 60
        held_out |= text_digests(rows)
    assert len(files) == 4
    assert not text_digests(load_dialogues(None)) & held_out


@pytest.mark.shared
@pytest.mark.parametrize("name", ["base", "chat", "code", "instruct", "math"])
def test_mini_models_read_enough_of_the_shipped_dialogues(shared: Path, name: str) -> None:
    variant = reader_of(shared / "families" / "mini-qwen2" / name)
    text = encode(load_dialogues(None), variant)
    assert 4_600 <= text.num_response_tokens < 4_600 + 512
    ends = variant.eos_token_ids | variant.tokenizer.special_ids
    whole = [s for s in text.sequences if len(s.token_ids) < 512]
    assert all(s.token_ids[span.stop - 1] in ends for s in whole for span in s.responses)
    assert len(prompts_only(load_dialogues(None), variant)) >= 100


@pytest.mark.shared
def test_shipped_dialogues_are_enough_with_a_large_vocabulary(qwen: Tokenizer) -> None:
    variant = VariantReader(
        tokenizer=qwen,
        template=compiled(tiny.CHATML),
        eos_token_ids=frozenset({151_645}),
        vocab_size=151_936,
    )
    every = encode(load_dialogues(None), variant, max_response_tokens=1 << 30)
    assert len(every.sequences) == len(load_dialogues(None))
    assert every.num_response_tokens >= 5_000


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [
        "alpaca",
        "chatml",
        "gemma-it",
        "llama-3-instruct",
        "mistral-instruct",
        "qwen2.5-instruct",
        "zephyr",
    ],
)
def test_shipped_dialogues_are_enough_in_every_format(
    shared: Path, qwen: Tokenizer, name: str
) -> None:
    source = (shared / "data" / "chat_templates" / f"{name}.jinja").read_text()
    variant = VariantReader(
        tokenizer=qwen,
        template=compiled(source),
        eos_token_ids=frozenset({151_645}),
        vocab_size=151_936,
    )
    assert encode(load_dialogues(None), variant).num_response_tokens >= 4_600


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Tokenizer:
    return _qwen(shared / "data" / "tokenizers" / "qwen2.5")


def _qwen(directory: Path) -> Tokenizer:
    """Qwen2.5's tokenizer from vocabulary and merges, as transformers builds it."""
    vocabulary = json.loads((directory / "vocab.json").read_text())
    lines = (directory / "merges.txt").read_text().splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [(a, b) for a, b in pairs]))
    inner.normalizer = normalizers.NFC()
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer = Tokenizer(inner, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [151_645]
    return tokenizer
