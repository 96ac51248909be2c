from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, pre_tokenizers, processors

from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.dialogues import Dialogue, Role, Turn
from linker_core.tuning.reading import VariantReader
from tests import tiny
from tests.linker_core.text import tokenizers_by_kind as kinds
from tests.templates import compiled, rendered

TEMPLATES = (
    "alpaca",
    "chatml",
    "gemma-it",
    "llama-3-instruct",
    "mistral-instruct",
    "qwen2.5-instruct",
    "zephyr",
)
MARKUP = (
    "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip


def talk(*turns: tuple[Role, str]) -> Dialogue:
    return Dialogue(
        turns=tuple(Turn(role=role, content=content) for role, content in turns), kind="talk"
    )


def chat() -> Dialogue:
    return talk(
        ("user", "Name a fish."), ("assistant", "A carp."), ("user", "More?"), ("assistant", "Eel")
    )


def reader(
    template: str | None = tiny.CHATML,
    *,
    inner: tokenizers.Tokenizer | None = None,
    eos: Sequence[int] = (2,),
    vocab_size: int = 10_000,
) -> VariantReader:
    return VariantReader(
        tokenizer=Tokenizer(
            inner or tiny.byte_level_tokenizer(512), bos_token="<s>", eos_token="</s>"
        ),
        template=None if template is None else compiled(template),
        eos_token_ids=frozenset(eos),
        vocab_size=vocab_size,
    )


def with_markup() -> tokenizers.Tokenizer:
    inner = tiny.byte_level_tokenizer(400)
    inner.add_special_tokens([AddedToken(token, special=True) for token in MARKUP])
    return inner


def answers(variant: VariantReader, dialogue: Dialogue, max_tokens: int = 1000) -> list[str]:
    ids, spans = variant.read(dialogue, max_tokens=max_tokens)
    return [
        variant.tokenizer.decode(ids[span.start : span.stop], skip_special_tokens=False)
        for span in spans
    ]


def test_answers_are_the_assistants_words_and_their_stop_token() -> None:
    variant = reader()
    ids, spans = variant.read(chat(), max_tokens=1000)
    assert answers(variant, chat()) == ["A carp.<|im_end|>", "Eel<|im_end|>"]
    assert variant.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nName a fish.<|im_end|>\n<|im_start|>assistant\nA carp.<|im_end|>\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\nEel<|im_end|>"
    )
    assert spans[-1].stop == len(ids)


def test_each_answer_follows_the_prompt_that_serving_makes() -> None:
    variant = reader()
    ids, spans = variant.read(chat(), max_tokens=1000)
    assert variant.prompt(chat()) == ids[: spans[1].start]
    first = talk(("user", "Name a fish."), ("assistant", "-"))
    assert variant.prompt(first) == ids[: spans[0].start]
    text = rendered(compiled(tiny.CHATML), [{"role": "user", "content": "Name a fish."}])
    assert variant.prompt(first) == variant.tokenizer.encode(text, add_special_tokens=False)


def test_prompt_keeps_its_tokens_where_the_answer_would_merge_with_it() -> None:
    """ "a" ends the prompt and is one token there; "a" + "b" is one token of the pairs."""
    inner = tiny.byte_level_tokenizer(60_000)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    variant = reader(template, inner=inner, eos=(), vocab_size=60_000)
    (merged,) = variant.tokenizer.encode("ab", add_special_tokens=False)
    ids, spans = variant.read(talk(("user", "a"), ("assistant", "b")), max_tokens=9)
    assert merged not in ids
    assert ids == [
        token for text in "ab" for token in variant.tokenizer.encode(text, add_special_tokens=False)
    ]
    assert spans == [range(1, 2)]


def test_words_keep_the_space_they_have_inside_a_text() -> None:
    """Metaspace tokenizers put a space before a text that is encoded alone."""
    inner = kinds.byte_fallback()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    variant = reader(template, inner=inner)
    ids, spans = variant.read(talk(("user", "b"), ("assistant", " a b")), max_tokens=9)
    assert ids == variant.tokenizer.encode("b a b", add_special_tokens=False)
    assert spans == [range(1, 3)]


def test_template_that_rewrites_history_leaves_the_last_answer() -> None:
    only_last = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if m.role == 'user' or loop.last else '…' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    variant = reader(only_last)
    assert answers(variant, chat()) == ["Eel<|im_end|>"]
    assert len(variant.prompt(chat())) == variant.read(chat(), max_tokens=1000)[1][0].start


def test_template_that_announces_otherwise_than_it_writes_leaves_the_last_answer() -> None:
    thinking = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    variant = reader(thinking)
    ids, (span,) = variant.read(chat(), max_tokens=1000)
    assert ids[: span.start] == variant.prompt(chat())
    assert answers(variant, chat()) == ["Eel<|im_end|>"]


def test_template_that_drops_the_answer_still_has_it_end() -> None:
    variant = reader("{% for m in messages if m.role == 'user' %}{{ m.content }} {% endfor %}")
    assert answers(variant, chat()) == ["Eel<|im_end|>"]
    without_eos = reader("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert answers(without_eos, talk(("user", "Q"), ("assistant", "A")))[0].startswith("A")


def test_answer_without_stop_token_ends_with_the_turns_special_token() -> None:
    assert answers(reader(eos=(0,)), chat())[0] == "A carp.<|im_end|>"
    assert answers(reader(eos=()), chat())[1] == "Eel<|im_end|>"


def test_model_without_template_reads_contents_apart_by_blank_lines() -> None:
    variant = reader(None)
    dialogue = talk(("system", "Be brief."), ("user", "One?"), ("assistant", "Two."))
    ids, spans = variant.read(dialogue, max_tokens=1000)
    assert variant.tokenizer.decode(ids) == "Be brief.\n\nOne?\n\nTwo."
    assert answers(variant, dialogue) == ["Two."]
    assert variant.prompt(dialogue) == ids[: spans[0].start]


def test_model_without_template_reads_its_bos_token_once() -> None:
    inner = tiny.byte_level_tokenizer(512)
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ids, _ = reader(None, inner=inner).read(chat(), max_tokens=1000)
    assert ids[0] == 0
    assert ids.count(0) == 1


def test_answer_that_opens_a_dialogue_is_not_asked_for_its_first_token() -> None:
    ids, spans = reader(None).read(talk(("assistant", "Welcome!")), max_tokens=1000)
    assert spans == [range(1, len(ids))]


def test_plain_text_is_read_without_the_template() -> None:
    variant = reader()
    turn = Turn(role="assistant", content="Once upon a time")
    text = Dialogue(turns=(turn,), kind="tale", plain=True)
    ids, spans = variant.read(text, max_tokens=1000)
    assert variant.tokenizer.decode(ids, skip_special_tokens=False) == "Once upon a time"
    assert spans == [range(1, len(ids))]


def test_sequence_is_cut_and_refused_where_no_answer_is_left() -> None:
    variant = reader()
    ids, (first, second) = variant.read(chat(), max_tokens=1000)
    for limit in (first.start + 1, first.stop, first.stop + 1, second.start, second.start + 1):
        cut, spans = variant.read(chat(), max_tokens=limit)
        assert cut == ids[: spans[-1].stop]
        assert spans[0] == range(first.start, min(first.stop, limit))
        assert len(spans) == (2 if limit > second.start else 1)
    with pytest.raises(InvalidRequestError, match="no answer begins"):
        variant.read(chat(), max_tokens=first.start)


def test_ids_beyond_the_models_rows_are_refused() -> None:
    assert reader(vocab_size=512).read(chat(), max_tokens=1000)
    narrow = reader(vocab_size=max(reader().read(chat(), max_tokens=1000)[0]))
    with pytest.raises(InvalidRequestError, match="beyond the model's last"):
        narrow.read(chat(), max_tokens=1000)
    with pytest.raises(InvalidRequestError, match="beyond the model's last"):
        reader(vocab_size=2).prompt(chat())


def test_template_that_refuses_the_roles_is_the_users_error() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(InvalidRequestError, match="no system"):
        reader(strict).read(talk(("system", "s"), ("user", "q"), ("assistant", "a")), max_tokens=9)


@pytest.mark.shared
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_seven_families_give_the_answers(shared: Path, name: str) -> None:
    source = (shared / "data" / "chat_templates" / f"{name}.jinja").read_text()
    variant = reader(source, inner=with_markup(), eos=[401], vocab_size=409)  # </s>
    said = answers(variant, chat())
    ending = re.compile(r"\s*Eel(</s>|<end_of_turn>|<\|im_end\|>|<\|eot_id\|>)")
    assert ending.fullmatch(said[-1])
    ids, spans = variant.read(chat(), max_tokens=1000)
    assert ids[: spans[-1].start] == variant.prompt(chat())


@pytest.mark.shared
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_stripped_of_their_layout_give_every_answer(shared: Path, name: str) -> None:
    """The collection's files spell templates over several lines; checkpoints hold one line."""
    source = (shared / "data" / "chat_templates" / f"{name}.jinja").read_text()
    one_line = re.sub(r"(?<=\})\s+(?=\{)", "", source.strip())
    variant = reader(one_line, inner=with_markup(), eos=[401], vocab_size=409)
    said = answers(variant, chat())
    assert [text.strip().partition("<")[0] for text in said] == ["A carp.", "Eel"]
    assert all(text.endswith(MARKUP) for text in said)
