"""What an answer must follow, as grammars take it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import llguidance
import pytest

from server.gateway.formats import ResponseFormat, StructuredOutputs, constraint_of

BYTES = llguidance.LLTokenizer("byte")
SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "in": {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"]},
        "of": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["ok", "in", "of"],
    "additionalProperties": False,
}
VALUE = {"ok": True, "in": {"x": 1}, "of": [1, 2]}
NUM_GAPS = 24  # between the tokens of `VALUE`, and to spare
MAX_GAP = 17  # a line's end and sixteen blanks


def asked_schema(schema: Mapping[str, Any]) -> str:
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    constraint = constraint_of(ResponseFormat.model_validate(asked), None)
    assert constraint is not None
    return constraint.grammar


def asked_object() -> str:
    constraint = constraint_of(ResponseFormat(type="json_object"), None)
    assert constraint is not None
    return constraint.grammar


def asked_json(schema: Mapping[str, Any]) -> str:
    constraint = constraint_of(None, StructuredOutputs.model_validate({"json": schema}))
    assert constraint is not None
    return constraint.grammar


GRAMMARS = [asked_schema(SCHEMA), asked_object(), asked_json(SCHEMA)]


def matcher_of(grammar: str) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepts(grammar: str, text: str) -> bool:
    matcher, tokens = matcher_of(grammar), BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def greedy(grammar: str, preferred: str, *, num_tokens: int) -> str:
    """Returns what a model writes that always takes the first of its preferred bytes it may."""
    matcher = matcher_of(grammar)
    written = bytearray()
    while not matcher.is_stopped() and len(written) < num_tokens:
        mask = matcher.compute_logit_bias()
        order = [*preferred.encode(), *range(256)]
        written.append(next(byte for byte in order if mask[byte]))
        matcher.consume_token(written[-1])
    return written.decode()


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(VALUE),
        json.dumps(VALUE, separators=(",", ":")),
        json.dumps(VALUE, indent=2),
        json.dumps(VALUE, indent=4),
        json.dumps(VALUE, indent="\t"),
    ],
)
def test_json_is_taken_in_each_way_people_print_it(grammar: str, text: str) -> None:
    assert accepts(grammar, text)


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("blank", ["  ", "\n\n", " \n", "\n" + " " * MAX_GAP, "\t"])
def test_white_space_of_json_is_bounded(grammar: str, blank: str) -> None:
    assert not accepts(grammar, json.dumps(VALUE).replace("{", "{" + blank, 1))


@pytest.mark.parametrize("preferred", [" ", "\n ", "\n\t", "\t\n ", "\r "])
def test_model_that_loves_white_space_still_ends_its_answer(preferred: str) -> None:
    # Behind the blanks it prefers what closes a value, so that its answer has an end to come to.
    limit = NUM_GAPS * (1 + MAX_GAP)
    answer = greedy(asked_schema(SCHEMA), preferred + "]}", num_tokens=limit)
    assert json.loads(answer).keys() == VALUE.keys()
    assert len(answer) < limit


def test_schema_that_sets_its_own_spacing_keeps_it() -> None:
    grammar = asked_schema({**SCHEMA, "x-guidance": {"whitespace_flexible": False}})
    assert accepts(grammar, json.dumps(VALUE, separators=(",", ":")))
    assert not accepts(grammar, json.dumps(VALUE))
