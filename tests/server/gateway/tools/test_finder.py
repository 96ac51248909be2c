from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.gateway.tools import calls as calls_module
from server.gateway.tools import finder as finder_module
from server.gateway.tools.finder import MAX_CALL_CHARS, CallFinder
from server.gateway.tools.pieces import Arguments, CallBegun, Content, Piece
from server.gateway.tools.wire import HERMES, LLAMA3, WireFormat

NAMES = ("get", "put")
GET = '{"name": "get", "arguments": {"x": 1}}'
PUT = '{"name": "put", "arguments": {}}'
CALLED_GET = ("get", '{"x": 1}')
CALLED_PUT = ("put", "{}")
_FORMATS = st.sampled_from([HERMES, LLAMA3])
# What calls are made of, whole and broken, so that random texts come close to them.
_FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<|python_tag|>", "<tool_", "<", "</", "{", "}", "[", "]", '"',
     "\\", " ", "\n", "; ", ",", "a", "é", GET, PUT, '{"name": "get", ', '"arguments": {', "<<|",
     '{"function": ', '"arguments": "']
)  # fmt: skip
_WRITTEN = st.lists(_FRAGMENTS, max_size=30).map("".join)


def parsed(wire: WireFormat, *parts: str) -> list[Piece]:
    finder = CallFinder(wire, NAMES)
    pieces = [piece for part in parts for piece in finder.push(part)]
    return pieces + finder.finish()


def summed(pieces: Sequence[Piece]) -> list[str | tuple[str, str]]:
    """Contents and calls in their order, each in one piece."""
    found: list[str | tuple[str, str]] = []
    for piece in pieces:
        latest = found[-1] if found else None
        if isinstance(piece, CallBegun):
            found.append((piece.name, ""))
        elif isinstance(piece, Arguments):
            assert isinstance(latest, tuple)
            found[-1] = (latest[0], latest[1] + piece.text)
        elif isinstance(latest, str):
            found[-1] = latest + piece.text
        else:
            found.append(piece.text)
    return found


def marked(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (marked(GET), [CALLED_GET]),
        (f"\n{marked(GET)}\n{marked(PUT)}\n", [CALLED_GET, CALLED_PUT]),
        (f"I look.\n{marked(GET)}", ["I look.\n", CALLED_GET]),
        (f"I look.{marked(GET)} And {marked(PUT)} so on", [
            "I look.", CALLED_GET, " And ", CALLED_PUT, " so on"]),
        (f"<tool_call>{GET}</tool_call>", [CALLED_GET]),
        (f"<tool_call>[{GET},{PUT}]</tool_call>", [CALLED_GET, CALLED_PUT]),
        (f"<tool_call>\n{GET}", [CALLED_GET]),
        (f"<tool_call>\n{GET}\n</tool", [CALLED_GET]),
        (f"<<tool_call>{GET}</tool_call>", ["<", CALLED_GET]),
        ('<tool_call>{"name": "get", "arguments": {"x": "</tool_call>"}}</tool_call>',
         [("get", '{"x": "</tool_call>"}')]),
        (marked('{"name": "put"}'), [CALLED_PUT]),
        (marked('{"name": "get", "arguments": "{\\"x\\": 1}"}'), [CALLED_GET]),
        (marked('{"name": "get", "arguments": {"x": "a\nb"}}'), [("get", '{"x": "a\\nb"}')]),
        # The first has no closing tag, so it is none; the marker behind it is seen all the same.
        (f"<tool_call>{PUT}<tool_call>{GET}</tool_call>", [f"<tool_call>{PUT}", CALLED_GET]),
        (f"<tool_call>\n<tool_call>{GET}</tool_call>", ["<tool_call>\n", CALLED_GET]),
    ],
)  # fmt: skip
def test_hermes_calls_are_found_and_the_rest_is_content(
    text: str, found: list[str | tuple[str, str]]
) -> None:
    assert summed(parsed(HERMES, text)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GET, [CALLED_GET]),
        (f" {GET}\n", [CALLED_GET]),
        (f"{GET}; {PUT}", [CALLED_GET, CALLED_PUT]),
        (f"{GET}\n{PUT}", [CALLED_GET, CALLED_PUT]),
        (f"{GET}, {PUT},{GET}", [CALLED_GET, CALLED_PUT, CALLED_GET]),
        (f"{GET}, and so on", [CALLED_GET, ", and so on"]),
        ('<|python_tag|>{"name": "put"}', [CALLED_PUT]),
        ('{"type": "function", "function": "get", "parameters": {"x": 1}}', [CALLED_GET]),
        (f"[{GET}, {PUT}]", [CALLED_GET, CALLED_PUT]),
        (f"<|python_tag|>{GET}", [CALLED_GET]),
        (f"Well. <|python_tag|>{GET}; {PUT}", ["Well. ", CALLED_GET, CALLED_PUT]),
        (f"{GET} done", [CALLED_GET, " done"]),
        (f"{GET}; done", [CALLED_GET, "; done"]),
        ('{"name": "get", "parameters": {"x": 1}}', [CALLED_GET]),
    ],
)
def test_llama_calls_are_found_and_the_rest_is_content(
    text: str, found: list[str | tuple[str, str]]
) -> None:
    assert summed(parsed(LLAMA3, text)) == found


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\n\n", "hello", "<tool", "<tool_call>", "a < b", "<tool_call>hello</tool_call>",
        "<tool_call>{}</tool_call>", "<tool_call>{", f"<tool_call>{GET}}}</tool_call>",
        f"<tool_call>{GET}{GET}</tool_call>", f"<tool_call>{GET} and", f"  <tool_call>{GET[:-1]}",
        marked(GET.replace("get", "drop")), marked(GET.replace('"x"', "x")), GET,
        marked('{"name": "get", "arguments": "[]"}'), "</tool_call>",
    ],
)  # fmt: skip
def test_text_without_a_sound_hermes_call_is_content_as_it_is(text: str) -> None:
    assert summed(parsed(HERMES, text)) == ([text] if text else [])


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "hello", '{"answer": 42}', "[1, 2]", '{"name": "Ann", "parameters": {}}', GET[:-1],
        f"Like so: {GET}", '{"name": "get"}',
        "<|python_tag|>print(1)", "<|python_tag|>", "<|pyth", f"; {GET}", "{",
    ],
)  # fmt: skip
def test_text_without_a_sound_llama_call_is_content_as_it_is(text: str) -> None:
    assert summed(parsed(LLAMA3, text)) == ([text] if text else [])


def test_text_is_shown_at_once_and_a_call_when_it_is_whole() -> None:
    finder = CallFinder(HERMES, NAMES)
    assert finder.push("I look <") == [Content("I look ")]
    assert finder.push("b") == [Content("<"), Content("b")]
    assert finder.push("\n<tool_call>\n") == [Content("\n")]
    assert finder.push(GET) == []
    assert finder.push("\n</tool_call>") == [CallBegun("get"), Arguments('{"x": 1}')]
    assert finder.finish() == []


@settings(deadline=None)
@given(_FORMATS, st.data(), _WRITTEN)
def test_how_an_answer_is_cut_changes_nothing(
    wire: WireFormat, data: st.DataObject, text: str
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = summed(parsed(wire, text))
    assert summed(parsed(wire, *parts)) == whole
    assert summed(parsed(wire, *text)) == whole


@settings(deadline=None)
@given(_FORMATS, _WRITTEN)
def test_content_without_calls_is_the_whole_answer(wire: WireFormat, text: str) -> None:
    found = summed(parsed(wire, text))
    if not any(isinstance(one, tuple) for one in found):
        assert found == ([text] if text else [])


@settings(deadline=None)
@given(st.lists(st.text("ab \n;<>", max_size=5) | st.sampled_from([CALLED_GET, CALLED_PUT])))
def test_nothing_around_calls_is_lost_but_blanks(segments: list[str | tuple[str, str]]) -> None:
    written = {CALLED_GET: marked(GET), CALLED_PUT: marked(PUT)}
    text = "".join(one if isinstance(one, str) else written[one] for one in segments)
    expected: list[str | tuple[str, str]] = []
    for one in segments:
        if isinstance(one, str) and expected and isinstance(expected[-1], str):
            expected[-1] += one
        else:
            expected.append(one)
    has_calls = any(isinstance(one, tuple) for one in segments)
    assert summed(parsed(HERMES, text)) == [
        one for one in expected if isinstance(one, tuple) or (one.strip() if has_calls else one)
    ]


def test_call_longer_than_the_buffer_is_content() -> None:
    long = json.dumps({"name": "get", "arguments": {"x": "y" * MAX_CALL_CHARS}})
    text = marked(long)
    assert summed(parsed(HERMES, text)) == [text]
    assert summed(parsed(HERMES, f"<tool_call>{' ' * MAX_CALL_CHARS} {GET}</tool_call>"))[0] != ""
    fits = json.dumps({"name": "get", "arguments": {"x": "y" * (MAX_CALL_CHARS - 100)}})
    assert summed(parsed(HERMES, marked(fits)))[0][0] == "get"


_PARSERS = {finder_module.__file__, calls_module.__file__}


@contextmanager
def counting() -> Iterator[list[int]]:
    """Counts the lines that the parser executes, each of which takes a bounded number of steps."""
    count = [0]

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename not in _PARSERS:
            return None
        count[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


_PATTERNS = st.lists(_FRAGMENTS, min_size=1, max_size=4).map("".join)


@settings(deadline=None, max_examples=60)
@given(_FORMATS, _PATTERNS, st.integers(1, 7))
@example(HERMES, "<tool_call>{", 1)
@example(HERMES, "<tool_call>{}", 1)
@example(HERMES, f"<tool_call>{PUT}<", 3)
@example(HERMES, "<tool_call>" + "{" * 70, 1)
@example(HERMES, '<tool_call>{"', 1)
@example(HERMES, '<tool_call>{"name": "get", "arguments": "', 1)
@example(HERMES, '<tool_call>{"function": {"name": "get", "arguments": ""}}', 1)
@example(HERMES, " ", 1)
@example(LLAMA3, "[", 1)
@example(LLAMA3, "<|python_tag|>[", 1)
def test_work_is_linear_in_the_length(wire: WireFormat, pattern: str, width: int) -> None:
    few_repeats = 1_000 // len(pattern) + 1

    def lines(repeats: int) -> int:
        text = pattern * repeats  # whole, so that both texts are of the same mix
        length = len(text)
        with counting() as count:
            parsed(wire, *[text[at : at + width] for at in range(0, length, width)])
        return count[0]

    few, more, many = (lines(times * few_repeats) for times in (1, 2, 4))
    assert many - more <= 2 * (more - few) + 500  # what the ends take is in neither side
    assert many <= 40 * 4 * few_repeats * len(pattern)
