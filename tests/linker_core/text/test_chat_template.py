from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.text.chat_template import MAX_PROMPT_CHARS
from linker_core.text.template_source import TemplateSource
from tests.linker_core.text import tokenizers_by_kind as kinds
from tests.templates import compiled, compiled_in, rendered

Messages = list[dict[str, Any]]

TOOL: dict[str, object] = {
    "type": "function",
    "function": {"name": "temperature", "parameters": {"type": "object", "ä<b>": [1, 2.5, None]}},
}
CHATS: tuple[Messages, ...] = (
    [{"role": "user", "content": "Hi <b>&amp;</b> 'there' 🌍"}],
    [
        {"role": "system", "content": " Be brief. \n"},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": " Two. "},
        {"role": "user", "content": "\n\nThree {{ 7 * 7 }}"},
    ],
)


def render(source: str) -> str:
    return rendered(compiled(source), CHATS[0])


def reference(source: str, bos: str | None, eos: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=kinds.byte_fallback(), bos_token=bos, eos_token=eos
    )
    tokenizer.chat_template = source
    return tokenizer


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
def test_render_equals_transformers(shared: Path, name: str) -> None:
    bos, eos = "<s>", "</s>"
    source = (shared / "data" / "chat_templates" / f"{name}.jinja").read_text()
    ours, theirs = compiled(source), reference(source, bos, eos)
    for messages in CHATS:
        for prompt in (True, False):
            assert rendered(
                ours, messages, prompt=prompt, bos=bos, eos=eos
            ) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.shared
def test_render_with_tools_equals_transformers(shared: Path) -> None:
    source = (shared / "data" / "chat_templates" / "qwen2.5-instruct.jinja").read_text()
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é<"}}}
    messages: Messages = [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21"},
    ]
    ours = rendered(compiled(source), messages, tools=[TOOL])
    assert ours == reference(source, None, None).apply_chat_template(
        messages, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert "ä<b>" in ours


@pytest.mark.parametrize(
    "source",
    [
        kinds.CHATML,
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}"
        "{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }} {{ messages | tojson(indent=2) }}",
        "  {% if bos_token is defined %}a{% else %}b{% endif %}\n{{ bos_token }}|{{ documents }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}"
        "{% endgeneration %}{{ x }}",
        "{{ 'ab' * 3 }}{{ [1] * 2 }}{{ 2 ** 10 }}{{ 3 * 4 }}",
    ],
)
def test_render_small_templates_equals_transformers(source: str) -> None:
    theirs = reference(source, None, "</s>")
    ours = compiled(source)
    for messages in CHATS:
        for prompt in (True, False):
            assert rendered(
                ours, messages, prompt=prompt, eos="</s>"
            ) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_strftime_now_gives_the_date() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == len("2024-01-01")


def test_template_that_raises_gives_its_own_words_bounded() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate ' + 'x' * 9999) }}")
    assert len(caught.value.message) < 500
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson(indent=[]) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 10 ** 10000 }}",
        "{{ 2.0 ** 5 }}",
        "{% for i in range(10000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_render_misbehaving_template_is_an_invalid_request(source: str) -> None:
    template = compiled(source)
    with pytest.raises(InvalidRequestError):
        rendered(template, CHATS[0])


def test_render_out_of_bounds_says_the_bound() -> None:
    with pytest.raises(InvalidRequestError, match=str(MAX_PROMPT_CHARS)):
        render("{% for i in range(5000) %}{{ 'a' * 1000 }}{% endfor %}")


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% nonsense %}", "{{{"])
def test_template_that_does_not_compile_is_a_bad_checkpoint(source: str) -> None:
    with pytest.raises(BadCheckpointError, match="does not compile"):
        compiled(source)


def test_template_nested_too_deep_or_too_long_is_a_bad_checkpoint() -> None:
    with pytest.raises(BadCheckpointError):
        compiled("{{ " + "(" * 100_000 + " }}")
    with pytest.raises(BadCheckpointError, match="longer"):
        TemplateSource.of("a" * ((1 << 20) + 1))


def test_load_prefers_the_file_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert TemplateSource.load(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "from config"}))
    assert render_of(tmp_path) == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert render_of(tmp_path) == "from file"


def test_load_takes_the_default_of_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": named}))
    assert render_of(tmp_path) == "plain"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    assert TemplateSource.load(tmp_path) is None


def test_load_odd_template_is_a_bad_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(BadCheckpointError, match="chat_template"):
        TemplateSource.load(tmp_path)


def render_of(directory: Path) -> str:
    return rendered(compiled_in(directory), CHATS[0])


def test_template_that_links_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(BadCheckpointError, match="symbolic link"):
        TemplateSource.load(tmp_path / "model")


def test_template_failures_of_every_kind_are_the_requests() -> None:
    with pytest.raises(InvalidRequestError):
        rendered(compiled("{{ cycler() }}"), [])
    nested = "{% for a in b %}" * 30 + "{% endfor %}" * 30
    with pytest.raises(BadCheckpointError, match="compile"):
        compiled(nested)
