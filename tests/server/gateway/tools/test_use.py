from __future__ import annotations

from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from server.gateway.schemas.chat import CHAT_NEUTRAL, ChatRequest
from server.gateway.schemas.parsing import parse_request
from server.gateway.tools.bounds import MAX_SCHEMA_CHARS
from server.gateway.tools.finder import CallFinder
from server.gateway.tools.forced import ForcedCalls
from server.gateway.tools.use import ToolUse, tool_use
from server.gateway.tools.wire import HERMES, LLAMA3, PLAIN
from tests.server.gateway.tools.test_forced import INTEGER, accepts, written

HERMES_TEMPLATE = "{{ tools }}<tool_call>"
LLAMA_TEMPLATE = "{{ tools }}<|start_header_id|>"
OTHER_TEMPLATE = "{{ tools }}[TOOL_CALLS]"
STRICT = INTEGER | {"additionalProperties": False}
NAMED = {"type": "function", "function": {"name": "put"}}
ANSWER = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER}}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def request(**more: Any) -> ChatRequest:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [tool("get", parameters=STRICT), tool("put")],
        **more,
    }
    return parse_request(ChatRequest, body, neutral=CHAT_NEUTRAL)


def use(template: str = HERMES_TEMPLATE, **more: Any) -> ToolUse:
    found = tool_use(request(**more), template)
    assert found is not None
    return found


def grammar_of(found: ToolUse) -> str:
    constraint = found.constraint()
    assert constraint is not None
    assert constraint.param == "tools"
    return constraint.grammar


@pytest.mark.parametrize("more", [{"tools": None}, {"tools": []}, {"tool_choice": "none"}])
def test_without_tools_or_with_the_choice_of_none_text_is_content(more: dict[str, Any]) -> None:
    assert tool_use(request(**more), HERMES_TEMPLATE) is None


@pytest.mark.parametrize("choice", [None, "auto"])
def test_model_that_may_call_is_free_and_its_calls_are_found(choice: str | None) -> None:
    found = use(tool_choice=choice)
    assert found.wire is HERMES
    assert found.constraint() is None
    assert isinstance(found.parser(), CallFinder)


@pytest.mark.parametrize(
    ("template", "wire"),
    [(HERMES_TEMPLATE, HERMES), (LLAMA_TEMPLATE, LLAMA3), (OTHER_TEMPLATE, PLAIN)],
)
def test_model_that_has_to_call_follows_a_grammar_in_its_own_format(
    template: str, wire: Any
) -> None:
    found = use(template, tool_choice="required")
    assert (found.wire, found.is_forced, found.is_named, found.only_one) == (
        wire, True, False, False,
    )  # fmt: skip
    assert isinstance(found.parser(), ForcedCalls)
    grammar = grammar_of(found)
    assert accepts(grammar, written(wire, ("get", '{"x": 1}'), ("put", "{}")))
    assert not accepts(grammar, "hello")


def test_named_function_is_called_once_and_no_other() -> None:
    grammar = grammar_of(use(tool_choice=NAMED))
    assert accepts(grammar, written(HERMES, ("put", "{}")))
    assert not accepts(grammar, written(HERMES, ("get", '{"x": 1}')))
    assert not accepts(grammar, written(HERMES, ("put", "{}"), ("put", "{}")))


def test_allowed_tools_are_the_only_ones_that_are_offered() -> None:
    def choice(mode: str) -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": "put"}}]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    free, forced = use(tool_choice=choice("auto")), use(tool_choice=choice("required"))
    assert [one.name for one in free.functions] == ["put"]
    assert not free.is_forced
    assert forced.is_forced
    assert not forced.is_named
    assert not accepts(grammar_of(forced), written(HERMES, ("get", '{"x": 1}')))
    offered = request(tool_choice=choice("auto")).offered_tools()
    assert [one.function.name for one in offered] == ["put"]


@pytest.mark.parametrize("template", [HERMES_TEMPLATE, LLAMA_TEMPLATE])
def test_one_call_at_the_most_is_a_grammar_too(template: str) -> None:
    found = use(template, parallel_tool_calls=False)
    one = written(found.wire, ("put", "{}"))
    two = written(found.wire, ("put", "{}"), ("put", "{}"))
    grammar = grammar_of(found)
    assert accepts(grammar, "Hello {there}.")
    assert accepts(grammar, one)
    assert not accepts(grammar, two)
    forced = grammar_of(use(template, parallel_tool_calls=False, tool_choice="required"))
    assert accepts(forced, one)
    assert not accepts(forced, two)


def test_strict_function_is_called_as_its_schema_says_or_not_at_all() -> None:
    tools = [tool("get", parameters=STRICT, strict=True), tool("put", parameters=INTEGER)]
    for template in (HERMES_TEMPLATE, LLAMA_TEMPLATE):
        found = use(template, tools=tools)
        grammar = grammar_of(found)
        assert accepts(grammar, "Hello.")
        assert accepts(grammar, written(found.wire, ("get", '{"x": 1}'), ("get", '{"x": 2}')))
        assert not accepts(grammar, written(found.wire, ("get", '{"x": "1"}')))
    hermes = grammar_of(use(tools=tools))
    assert accepts(hermes, "I look. " + written(HERMES, ("get", '{"x": 1}')) + " So.")


def test_answer_calls_or_follows_the_response_format() -> None:
    grammar = grammar_of(use(response_format=FORMAT))
    assert accepts(grammar, '{"ok": true}')
    assert accepts(grammar, written(HERMES, ("put", "{}"), ("put", "{}")))
    assert not accepts(grammar, "hello")
    assert not accepts(grammar, '{"ok": 3}')
    assert not accepts(grammar, '{  "ok": true}')
    # Where the answer has to be calls, there is nothing that could follow the format.
    assert not accepts(grammar_of(use(response_format=FORMAT, tool_choice="required")), "{}")
    assert use(response_format={"type": "text"}).constraint() is None


@pytest.mark.parametrize(
    ("template", "more", "param"),
    [
        (OTHER_TEMPLATE, {}, "tool_choice"),
        (HERMES_TEMPLATE, {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (LLAMA_TEMPLATE, {"response_format": FORMAT}, "response_format"),
    ],
)
def test_what_cannot_be_honoured_together_is_refused(
    template: str, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tool_use(request(**more), template)
    assert caught.value.param == param


def test_schemas_that_are_too_long_together_are_refused() -> None:
    schema = {"type": "object", "description": "a" * (MAX_SCHEMA_CHARS - 100)}
    found = use(
        tools=[tool("a", parameters=schema), tool("b", parameters=schema)], tool_choice="required"
    )
    with pytest.raises(InvalidRequestError) as caught:
        found.constraint()
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("more", "has_called", "expected"),
    [
        ({}, True, "tool_calls"), ({}, False, "stop"), ({"tool_choice": NAMED}, True, "stop"),
        ({"tool_choice": "required"}, True, "tool_calls"),
    ],
)  # fmt: skip
def test_finish_reason_is_openais(more: dict[str, Any], has_called: bool, expected: str) -> None:
    found = use(**more)
    assert found.finish_reason("stop", has_called=has_called) == expected
    assert found.finish_reason("length", has_called=has_called) == "length"
