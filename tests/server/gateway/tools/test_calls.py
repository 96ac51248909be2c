from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.gateway.tools.calls import MAX_DEPTH, Call, JsonSpan, Progress, read_calls

NAMES = {"get", "put"}
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
_objects = st.dictionaries(_texts, _values, max_size=4)


def span_end(text: str) -> int | None:
    """Returns where the value ends; None if it is broken or goes on."""
    span = JsonSpan()
    for at, char in enumerate(text):
        progress = span.take(char)
        if progress is not Progress.OPEN:
            return at + 1 if progress is Progress.ENDED else None
    return None


@settings(deadline=None)
@given(_objects | st.lists(_values), _texts, st.booleans(), st.sampled_from([None, 2]))
def test_span_ends_where_the_json_does(
    value: Any, behind: str, is_ascii: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    assert span_end(text + behind) == len(text)


@pytest.mark.parametrize("text", ["{]", "[}", '{"a\x1f', '["\x00', "[" * (MAX_DEPTH + 1)])
def test_span_breaks_at_what_can_never_be_json(text: str) -> None:
    span = JsonSpan()
    *before, last = [span.take(char) for char in text]
    assert set(before) <= {Progress.OPEN}
    assert last is Progress.BROKEN


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(NAMES)), _objects), min_size=1, max_size=3))
def test_calls_keep_their_arguments_as_they_were_written(
    calls: list[tuple[str, dict[str, Any]]],
) -> None:
    written = [json.dumps(arguments, indent=1) for _, arguments in calls]
    records = [
        f'{{"name": "{name}", "parameters" :{text} }}'
        for (name, _), text in zip(calls, written, strict=True)
    ]
    found = read_calls(f"[{', '.join(records)}]", NAMES, is_marked=False)
    names = [name for name, _ in calls]
    assert found == tuple(Call(name, text) for name, text in zip(names, written, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        '{"arguments": {}, "name": "get"}',
        '{"type": "function", "id": 3, "name": "get", "arguments": {}}',
        '[{"name": "get", "parameters": {}}]',
        '{"type": "function", "function": {"name": "get", "arguments": {}}}',
        '{"type": "function", "function": "get", "parameters": {}}',
        '{"function": {"name": "get"}, "arguments": {}}',
        '{"name": "get", "arguments": "{}"}', '{"name": "get", "arguments": ""}',
        '{"name": "get", "parameters": null}',
    ],
)  # fmt: skip
def test_call_may_say_more_than_it_has_to(text: str) -> None:
    assert read_calls(text, NAMES, is_marked=False) == (Call("get", "{}"),)


@pytest.mark.parametrize("text", ['{"name": "get"}', '[{"function": {"name": "get"}}]'])
def test_call_that_is_marked_may_leave_its_arguments_out(text: str) -> None:
    assert read_calls(text, NAMES, is_marked=True) == (Call("get", "{}"),)
    assert read_calls(text, NAMES, is_marked=False) is None


@settings(deadline=None)
@given(_objects, st.sampled_from([None, 1]))
def test_arguments_may_come_as_a_text(arguments: dict[str, Any], indent: int | None) -> None:
    written = json.dumps(arguments, indent=indent)
    text = json.dumps({"name": "get", "arguments": written})
    assert read_calls(text, NAMES, is_marked=False) == (Call("get", written),)


@settings(deadline=None)
@given(st.text('ab\n\r\t"\\é', max_size=12), st.booleans())
def test_lines_inside_strings_are_escaped_as_json_has_it(said: str, is_text: bool) -> None:
    arguments = json.dumps({said: [said]}, indent=1)
    raw = re.sub(r"(?<!\\)((?:\\\\)*)\\n", "\\1\n", arguments)
    text = f'{{"name": "get",\n"arguments": {json.dumps(raw) if is_text else raw}}}'
    assert span_end(text) == len(text)
    assert read_calls(text, NAMES, is_marked=False) == (Call("get", arguments),)


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "[[]]", '["{"]', '{"name": "drop", "arguments": {}}',
        '{"name": "get", "arguments": []}', '{"name": "get", "arguments": "[]"}',
        '{"name": "get", "arguments": "x"}', '{"name": "get", "arguments": 3}',
        '{"name": "get", "arguments": "{\\"a\\": NaN}"}',
        '{"name": "get", "arguments": "' + '[' * 5000 + '"}',
        '{"name": "get", "arguments": "\\ud800"}',
        '{"name": "get", "function": "get", "arguments": {}}', '{"function": 3, "arguments": {}}',
        '{"function": {"name": "get", "arguments": {}}, "arguments": {}}',
        '{"function": {"function": {"name": "get", "arguments": {}}}}',
        '{"name": "get", "arguments": {}, "parameters": {}}', '{"name": 3, "arguments": {}}',
        '{"name": "get", "arguments": {}, "more": 1}', '{"name": ["get"], "arguments": {}}',
        '{"type": "custom", "name": "get", "arguments": {}}',
        '{"name": "get", "name": "put", "arguments": {}}',
        '{"name": "get", "arguments": {"a": NaN}}', '{"name": "get", "arguments": {"a": 1e999}}',
        '{"name": "get", "arguments": {}} x', "{'name': 'get', 'arguments': {}}", "nothing",
        '[{"name": "get", "arguments": {}}, 3]', '{"name": "get", "arguments": {}',
        '{"name": "get", "arguments": {"a": ' + "9" * 5000 + "}}",
    ],
)  # fmt: skip
def test_what_is_no_call_of_what_is_offered_is_none(text: str) -> None:
    assert read_calls(text, NAMES, is_marked=True) is None
