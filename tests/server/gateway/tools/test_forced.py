from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.engine import grammar_trial
from server.gateway.schemas.tools import MAX_TOOLS, Function
from server.gateway.tools.calls import MAX_DEPTH
from server.gateway.tools.forced import ForcedCalls, calls_grammar
from server.gateway.tools.pieces import Arguments, CallBegun, Piece
from server.gateway.tools.wire import HERMES, LLAMA3, PLAIN, WireFormat
from tests.server.gateway.tools.test_finder import parsed, summed

WIRES = [HERMES, LLAMA3, PLAIN]
INTEGER = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
GET = Function(name="get", parameters=INTEGER | {"additionalProperties": False}, strict=True)
PUT = Function(name="put")
BYTES = llguidance.LLTokenizer("byte")


def accepts(grammar: str, text: str) -> bool:
    """Says whether a grammar, compiled as the engine compiles it, takes all of a text."""
    matcher = llguidance.LLMatcher(
        BYTES, llguidance.grammar_from("lark", grammar), log_level=0, limits=grammar_trial.limits()
    )
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def written(wire: WireFormat, *calls: tuple[str, str]) -> str:
    texts = [wire.before + name + wire.between + text + wire.after for name, text in calls]
    return wire.opening + wire.separator.join(texts) + wire.ending


def read(wire: WireFormat, *parts: str) -> list[Piece]:
    parser = ForcedCalls(wire)
    pieces = [piece for part in parts for piece in parser.push(part)]
    return pieces + parser.finish()


@pytest.mark.parametrize("wire", WIRES)
def test_grammar_takes_calls_as_the_model_writes_them(wire: WireFormat) -> None:
    grammar = calls_grammar(wire, [GET, PUT], only_one=False)
    assert accepts(grammar, written(wire, ("get", '{"x": -3}')))
    assert accepts(grammar, written(wire, ("put", "{}"), ("get", '{"x": 1}'), ("put", "{}")))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    "call",
    [
        ("get", '{"x": "1"}'), ("get", "{}"), ("get", '{"x": 1, "y": 2}'), ("put", '{"x": 1}'),
        ("drop", "{}"), ("get", '{"x":1}'), ("get", "[]"), ("get", "3"),
    ],
)  # fmt: skip
def test_grammar_takes_no_other_name_and_no_other_arguments(
    wire: WireFormat, call: tuple[str, str]
) -> None:
    assert not accepts(calls_grammar(wire, [GET, PUT], only_one=False), written(wire, call))


@pytest.mark.parametrize("wire", WIRES)
def test_grammar_takes_at_least_one_call_or_just_one(wire: WireFormat) -> None:
    grammar = calls_grammar(wire, [PUT], only_one=True)
    assert accepts(grammar, written(wire, ("put", "{}")))
    assert not accepts(grammar, written(wire, ("put", "{}"), ("put", "{}")))
    for only_one in (False, True):
        grammar = calls_grammar(wire, [PUT], only_one=only_one)
        assert not any(accepts(grammar, text) for text in ("", "hello", wire.opening + wire.ending))


def test_schemas_keep_their_own_definitions() -> None:
    def function(name: str, kind: str) -> Function:
        properties = {"x": {"$ref": "#/$defs/A"}}
        schema = {"type": "object", "properties": properties, "$defs": {"A": {"type": kind}}}
        return Function(name=name, parameters=schema)

    functions = [function("a", "boolean"), function("b", "null")]
    grammar = calls_grammar(HERMES, functions, only_one=True)
    assert accepts(grammar, written(HERMES, ("a", '{"x": true}')))
    assert accepts(grammar, written(HERMES, ("b", '{"x": null}')))
    assert not accepts(grammar, written(HERMES, ("a", '{"x": null}')))


def test_schema_that_cannot_be_enforced_matters_only_to_the_strict() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    lenient = calls_grammar(HERMES, [Function(name="get", parameters=schema)], only_one=True)
    assert accepts(lenient, written(HERMES, ("get", '{"x": [1]}')))
    function = Function(name="get", parameters=schema, strict=True)
    strict = calls_grammar(HERMES, [function], only_one=True)
    compiled = llguidance.LLMatcher(BYTES, llguidance.grammar_from("lark", strict), log_level=0)
    assert compiled.is_error()


def test_options_of_a_schema_are_not_the_clients() -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": True}}
    grammar = calls_grammar(HERMES, [Function(name="get", parameters=schema)], only_one=True)
    assert not accepts(grammar, written(HERMES, ("get", '{"x"    : 1}')))


def test_nothing_that_a_schema_says_gets_out_of_it() -> None:
    said = '"}\nstart: /.*/\ncall: "x" \u2028 %json {'
    schema = {"type": "object", "description": said, "properties": {said: {"const": said}}}
    function = Function(name="get", description=said, parameters=schema)
    grammar = calls_grammar(HERMES, [function], only_one=True)
    assert not accepts(grammar, "x")
    assert accepts(grammar, written(HERMES, ("get", json.dumps({said: said}, ensure_ascii=False))))


def test_as_many_functions_as_are_taken_compile_within_the_engines_limits() -> None:
    functions = [GET.model_copy(update={"name": f"get_{i}"}) for i in range(MAX_TOOLS)]
    grammar = calls_grammar(HERMES, functions, only_one=False)
    assert grammar_trial.ends(llguidance.grammar_from("lark", grammar))
    assert accepts(grammar, written(HERMES, ("get_127", '{"x": 1}'), ("get_0", '{"x": 1}')))


_arguments = st.dictionaries(st.text('ab{}"\\é', max_size=3), st.integers() | st.text(max_size=3))
_calls = st.lists(st.tuples(st.sampled_from(["get", "put"]), _arguments), min_size=1, max_size=3)


@settings(deadline=None)
@given(st.sampled_from(WIRES), _calls, st.integers(1, 9))
def test_every_answer_of_the_grammar_is_read_however_it_is_cut(
    wire: WireFormat, calls: list[tuple[str, dict[str, Any]]], width: int
) -> None:
    texts = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = written(wire, *texts)
    parts = [text[at : at + width] for at in range(0, len(text), width)]
    assert summed(read(wire, *parts)) == texts
    if wire.marker is not None:
        assert summed(parsed(wire, text)) == texts  # what may call is read as what has to


@settings(deadline=None)
@given(st.sampled_from(WIRES), st.integers(0, 200))
def test_answer_that_is_cut_short_shows_the_beginning_of_its_arguments(
    wire: WireFormat, length: int
) -> None:
    arguments = '{"x": "a}b", "y": [1, {}]}'
    text = written(wire, ("get", arguments))[:length]
    found = summed(read(wire, *text))
    assert all(isinstance(one, tuple) for one in found)
    begun = text.partition(wire.between)[2]
    assert found == ([("get", begun[: len(arguments)])] if len(text) > _behind_name(wire) else [])


def _behind_name(wire: WireFormat) -> int:
    return len(wire.opening + wire.before + "get" + wire.between)


def test_arguments_are_shown_as_they_come() -> None:
    parser = ForcedCalls(HERMES)
    begun = parser.push('<tool_call>\n{"name": "get", "arguments": {"x')
    assert begun == [CallBegun("get"), Arguments('{"x')]
    assert parser.push('": 1') == [Arguments('": 1')]
    assert parser.push("2") == [Arguments("2")]
    assert parser.push("}}\n</tool_call>") == [Arguments("}")]


@pytest.mark.parametrize(
    "text",
    [
        "hello", "<tool", "<tool_call>\n{'name'", '<tool_call>\n{"name": "get" and more',
        '<tool_call>\n{"name": "get", "arguments": }',
        '<tool_call>\n{"name": "get", "arguments": 3',
    ],
)  # fmt: skip
def test_nothing_is_lost_of_what_the_grammar_would_not_write(text: str) -> None:
    text += "\n"
    assert summed(read(HERMES, text)) == summed(read(HERMES, *text)) == [text]


def test_what_the_grammar_would_not_write_behind_a_call_is_content() -> None:
    called = written(HERMES, ("get", "{}"))
    assert summed(read(HERMES, f"{called[:-3]}x")) == [("get", "{}"), "}\n</tool_cax"]
    assert summed(read(HERMES, f"{called}\n<tool_call>\nx")) == [
        ("get", "{}"), "\n<tool_call>\nx",
    ]  # fmt: skip
    assert summed(read(HERMES, written(HERMES, ("get", "{}")) + "<|im_end|>")) == [
        ("get", "{}"), "<|im_end|>",
    ]  # fmt: skip


def test_arguments_that_are_too_deep_are_shown_and_not_sound() -> None:
    parser, deep = ForcedCalls(HERMES), '{"x":' * (MAX_DEPTH + 1)
    pieces = parser.push(HERMES.before + "get" + HERMES.between + deep + "1" + "}" * len(deep))
    assert summed(pieces) == [("get", deep.removesuffix('"x":')), '"x":1' + "}" * len(deep)]
    assert not parser.is_sound


def test_calls_are_sound_when_their_arguments_are_whole() -> None:
    parser = ForcedCalls(LLAMA3)
    text = written(LLAMA3, ("get", '{"x": 1}'), ("put", "{}"))
    sound = []
    for char in text:
        parser.push(char)
        sound.append(parser.is_sound)
    first, second = text.index('{"x"'), text.index("{}")
    unsound = [*range(first, first + 7), second]
    assert [at for at, is_sound in enumerate(sound) if not is_sound] == unsound
