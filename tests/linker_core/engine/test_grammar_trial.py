"""Grammars on trial: what comes to an end, and what never would."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from linker_core.engine.grammar_trial import ends, limits

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


@pytest.mark.parametrize(("length", "fits"), [(1000, True), (4000, False)])
def test_states_are_enough_for_a_bounded_string_of_a_page_alone(length: int, fits: bool) -> None:
    schema = {"type": "string", "maxLength": length}
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    for token in tokenizer.tokenize_str(json.dumps("q" * length)):
        matcher.compute_bitmask()
        matcher.consume_token(token)
    assert matcher.is_error() is not fits
