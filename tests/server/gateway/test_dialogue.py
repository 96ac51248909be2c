from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from linker_core.errors import InvalidRequestError
from linker_core.text.chat_template import ChatTemplate
from linker_core.text.template_source import TemplateSource, template_variables
from server.gateway.dialogue import Rendering, rendering
from server.gateway.schemas.chat import CHAT_NEUTRAL, ChatRequest
from server.gateway.schemas.parsing import parse_request
from server.gateway.tools.wire import HERMES
from tests.tiny import CHATML

TEMPLATE = "{{ messages }}{{ tools }}"
HI = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}
DEEP = '{"a": ' + "[" * 80 + "]" * 80 + "}"  # more than what renders it would go down


def given(*messages: dict[str, Any], template: str = TEMPLATE, **more: Any) -> Rendering:
    body = {"model": "m", "messages": list(messages), **more}
    return rendering(parse_request(ChatRequest, body, neutral=CHAT_NEUTRAL), template)


def seen(message: dict[str, Any], template: str = TEMPLATE) -> Any:
    (record,) = given(message, template=template).messages
    return record


def fault_of(message: dict[str, Any]) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequestError) as caught:
        given(message)
    return caught.value.param, caught.value.message


def test_answer_with_calls_is_read_as_templates_print_it() -> None:
    sent_back = {
        "role": "assistant", "content": None, "refusal": None, "audio": None, "annotations": [],
        "function_call": None, "tool_calls": [CALL],
    }  # fmt: skip
    function = {"name": "get", "arguments": {"x": 1}}
    assert seen(sent_back) == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function, "id": "call_1"}],
    }


def test_answer_without_calls_has_no_such_field() -> None:
    nothing: tuple[object, ...] = ([], None)
    for calls in nothing:
        message = {"role": "assistant", "content": "a", "tool_calls": calls}
        assert seen(message) == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"a": [1, "é"]}', {"a": [1, "é"]}), ("", {}), ("{}", {}),
        # What a model has written before is shown to it, sound or not.
        ('{"a": 1', '{"a": 1'), ("[1]", "[1]"), ("None", "None"), ("[" * 100_000, "[" * 100_000),
        (DEEP, DEEP), ('{"a": NaN}', '{"a": NaN}'), (r'{"a": "\ud800"}', r'{"a": "\ud800"}'),
    ],
)  # fmt: skip
def test_arguments_are_records_where_they_are_json(written: str, read: object) -> None:
    call = CALL | {"function": {"name": "get", "arguments": written}}
    record = seen({"role": "assistant", "tool_calls": [call]})
    assert record["tool_calls"][0]["function"]["arguments"] == read


def test_answer_of_a_tool_keeps_its_id_and_name() -> None:
    message = {"role": "tool", "tool_call_id": "call_1", "name": "get", "content": "3"}
    assert seen(message) == message


def test_old_function_messages_are_those_of_tools() -> None:
    assert seen({"role": "function", "name": "get", "content": None}) == {
        "role": "tool", "content": "", "name": "get",
    }  # fmt: skip
    called = seen({"role": "assistant", "function_call": {"name": "get", "arguments": "{}"}})
    function = {"name": "get", "arguments": {}}
    assert called["tool_calls"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function"])
def test_every_role_takes_parts_of_text(role: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": role, "content": parts, "tool_call_id": "call_1"}
    assert seen(message)["content"] == "a\nb"


def test_refusals_are_text_of_the_assistants() -> None:
    parts = [{"type": "refusal", "refusal": "no"}]
    assert seen({"role": "assistant", "content": parts})["content"] == "no"
    message = {"role": "assistant", "content": None, "refusal": "no"}
    assert seen(message)["content"] == "no"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "x" * 100])
def test_part_that_is_no_text_is_refused_in_words(kind: str) -> None:
    param, said = fault_of({"role": "user", "content": [{"type": kind, kind: {"url": "s3cret"}}]})
    assert param == "messages.0.content.0.type"
    assert "read text" in said
    assert "s3cret" not in said
    assert "Value error" not in said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text"),
        ({"role": "user", "content": [{"type": "refusal"}]}, "messages.0.content.0.refusal"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "messages.0.tool_calls"),
        ({"role": "tool", "content": "a", "tool_call_id": "b", "function_call": CALL["function"]},
         "messages.0.function_call"),
        ({"role": "assistant", "tool_calls": [CALL] * 129}, "messages.0.tool_calls"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]},
         "messages.0.tool_calls.0.type"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": {}}}]},
         "messages.0.tool_calls.0.function.arguments"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages.0.audio"),
    ],
)  # fmt: skip
def test_message_that_nobody_sends_is_refused_by_its_path(
    message: dict[str, Any], param: str
) -> None:
    assert fault_of(message)[0] == param


def test_developers_are_systems_where_the_template_does_not_know_them() -> None:
    message = {"role": "developer", "content": "a"}
    assert seen(message)["role"] == "system"
    assert seen(message, template="{{ 'developer' }}")["role"] == "developer"


def test_tools_are_shown_as_models_have_learned_to_read_them() -> None:
    parameters = {"type": "object", "properties": {"b": {}, "a": {}}}
    function = {"strict": True, "parameters": parameters, "description": "d", "name": "get"}
    tools = [
        {"type": "function", "function": function},
        {"type": "function", "function": {"name": "put"}},
    ]
    shown = given(HI, tools=tools).tools
    assert shown == [
        {"type": "function",
         "function": {"name": "get", "description": "d", "parameters": parameters}},
        {"type": "function", "function": {"name": "put"}},
    ]  # fmt: skip
    assert shown is not None
    shown_function = shown[0]["function"]
    assert isinstance(shown_function, dict)
    assert list(shown_function) == ["name", "description", "parameters"]
    assert given(HI, tools=[]).tools is None


def test_allowed_tools_alone_are_shown() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("get", "put")]
    allowed = {"mode": "auto", "tools": tools[1:]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert given(HI, tools=tools, tool_choice=choice).tools == tools[1:]


def rendered(*messages: dict[str, Any], template: str = CHATML) -> str:
    what = given(*messages, template=template, continue_final_message=True)
    variables = template_variables(
        what.messages,
        add_generation_prompt=what.add_generation_prompt,
        bos_token=None,
        eos_token=None,
    )
    return what.cut(ChatTemplate(TemplateSource.of(template)).render(variables))


@pytest.mark.parametrize("content", ["im", "Once upon ", "<|im_end|>", " a"])
def test_continued_text_ends_with_the_last_message(content: str) -> None:
    before = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(HI, {"role": "assistant", "content": content}) == before + content


@pytest.mark.parametrize(
    "template", ["{{ tools }}", "{% for i in 'ab' %}{{ messages }}{% endfor %}"]
)
def test_template_that_hides_or_repeats_a_message_cannot_continue_it(template: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        rendered(HI, template=template)
    assert caught.value.param == "continue_final_message"


def test_message_that_calls_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        rendered({"role": "assistant", "content": "a", "tool_calls": [CALL]})
    assert caught.value.param == "continue_final_message"


@pytest.mark.shared
@pytest.mark.parametrize("has_tools", [False, True])
def test_known_template_gets_what_transformers_would_give_it(shared: Path, has_tools: bool) -> None:
    template = (shared / "data/chat_templates/qwen2.5-instruct.jinja").read_text()
    tools: list[Any] | None = None
    if has_tools:
        tools = [{"type": "function", "function": {"name": "get"}}]
    arguments = {"x": [1, "é"]}
    read, sent = (
        {"role": "assistant", "content": "", "tool_calls": [
            CALL | {"function": {"name": "get", "arguments": given_as}}]}
        for given_as in (arguments, json.dumps(arguments))
    )  # fmt: skip
    before: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, HI]
    behind: list[dict[str, Any]] = [
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
        {"role": "tool", "content": "4", "tool_call_id": "call_2"},
    ]
    render: Any = render_jinja_template  # which says that it returns a text
    expected, _ = render(
        [[*before, read, *behind]], tools=tools, chat_template=template, add_generation_prompt=True
    )
    what = given(*before, sent, *behind, template=template, tools=tools)
    variables = template_variables(
        what.messages,
        add_generation_prompt=what.add_generation_prompt,
        bos_token=None,
        eos_token=None,
        tools=what.tools,
    )
    assert [ChatTemplate(TemplateSource.of(template)).render(variables)] == expected
    assert HERMES.before + "get" + HERMES.between in expected[0]
