"""Grammars on trial: what comes to an end, and what never would."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher

from linker_core.engine.grammar_trial import ends

KEYS = {f"p{n}": {"type": "string", "pattern": f"^[a-z]{{1,{n + 1}}}$"} for n in range(700)}


@pytest.mark.parametrize(
    "grammar",
    [
        LLMatcher.grammar_from_regex("a+b?"),
        LLMatcher.grammar_from_json_schema(json.dumps({"type": "object", "properties": KEYS})),
        "garbage {",  # an error is an end, too
        "",
        "\ud800",
    ],
)
def test_grammar_that_compiles_or_is_none_ends(grammar: str) -> None:
    assert ends(grammar)


def test_grammar_that_would_take_hours_is_stopped() -> None:
    patterns = " & ".join(f"/.*[ab].{{{n}}}c.*/" for n in range(10, 60))
    assert not ends(json.dumps({"grammars": [{"lark_grammar": f"start: T\nT: {patterns}"}]}))
