from __future__ import annotations

from pathlib import Path

import pytest

from server.gateway.tools.wire import HERMES, LLAMA3, names_read, wire_format


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("", set()),
        ("tools and # Tools", set()),
        ("{{ tools }}", {"tools"}),
        ("{%- if tools -%}x{% endif %}", {"if", "tools", "endif"}),
        ("{{ 'tools' + \"tools\" }} tools", set()),
        (r"{{ 'it\'s tools' }}", set()),
        ("{{ '%}' + tools }}", {"tools"}),
        ("{# tools #}{{ a.b }}", {"a", "b"}),
        ("{{ tools_here }}", {"tools_here"}),
        ("{{ tools", {"tools"}),
        ("{{ 'tools", set()),
        ("{# {{ tools }}", set()),
        ("{{ {'a': b}['c'] }} tools", {"b"}),
    ],
)
def test_names_are_those_of_the_program_not_of_its_texts(template: str, names: set[str]) -> None:
    assert names_read(template) == names


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '<tool_call>' }}", HERMES),
        ("<|start_header_id|> {{ '<tool_call>' }}", HERMES),
        ("<|start_header_id|>", LLAMA3),
        ("<|python_tag|>", LLAMA3),
        ("<tool_call><function=", None),
        ("<tool_call><arg_key>", None),
        ("<|start_header_id|><function=", None),
        ("[TOOL_CALLS]", None),
        ("<|im_start|>", None),
    ],
)
def test_format_is_known_by_its_marks(template: str, expected: object) -> None:
    assert wire_format(template) is expected


@pytest.mark.shared
def test_of_seven_families_one_knows_tools_and_writes_them_as_hermes(shared: Path) -> None:
    templates = {path.stem: path.read_text() for path in (shared / "data/chat_templates").iterdir()}
    assert len(templates) == 7
    knowing = {name for name, text in templates.items() if "tools" in names_read(text)}
    assert knowing == {"qwen2.5-instruct"}
    assert wire_format(templates["qwen2.5-instruct"]) is HERMES
    assert wire_format(templates["llama-3-instruct"]) is LLAMA3
    assert wire_format(templates["gemma-it"]) is None
