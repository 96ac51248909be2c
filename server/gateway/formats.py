"""What an answer must follow, as clients say it, and the grammar that says the same.

Compiles nothing: that is the engine's, whose refusals name `STRUCTURED_OUTPUTS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

import llguidance
from pydantic import BaseModel, ConfigDict, Field

from linker_core.errors import InvalidRequestError
from linker_core.weights import strict_json
from server.gateway.tools.bounds import MAX_SCHEMA_CHARS, MAX_SCHEMA_DEPTH, is_deeper

STRUCTURED_OUTPUTS: Final = "structured_outputs"
ANSWER_LINE: Final = 2  # where a grammar of calls has the schema of other answers
_RESPONSE_FORMAT: Final = "response_format"
_MAX_CHOICES = 1024
# Between two tokens of JSON: a blank, or a line's end with the next one's indent, as people print
# it. llguidance would take blanks without end, and models have spent whole answers on them.
_SPACING: Final = {"whitespace_pattern": r" |\n {0,16}|\n\t{1,8}"}

_Text = Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA_CHARS)]


class JsonSchema(BaseModel):
    """A named schema. Answers follow it whether or not the client asks for `strict`."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    definition: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's way to say it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's way to say it; exactly one of the fields."""

    # What vLLM knows beside these cannot be honoured, so nothing else is taken.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    # `json` alone would hide a method of the base class.
    schema_: dict[str, Any] | _Text | None = Field(default=None, alias="json")
    regex: _Text | None = None
    choice: list[_Text] | None = Field(default=None, min_length=1, max_length=_MAX_CHOICES)
    grammar: _Text | None = None  # Lark or GBNF


class Constraint(NamedTuple):
    """A grammar, and the field of the request that asked for it."""

    grammar: str
    param: str


def constraint_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Constraint | None:
    """Returns what an answer must follow; None for free text.

    Raises:
        InvalidRequestError: A constraint that contradicts itself or another, is too long or too
            deep, or is none.
    """
    asked = None if response_format is None else _of_format(response_format)
    if structured is None:
        return asked
    if asked is not None:
        raise InvalidRequestError(
            "response_format and structured_outputs both constrain the answer; keep one.",
            param=STRUCTURED_OUTPUTS,
        )
    return _of_structured(structured)


def format_schema(asked: ResponseFormat | None) -> Mapping[str, Any] | None:
    """Returns the schema that a format asks for; None for free text.

    Raises:
        InvalidRequestError: The format contradicts itself, or its schema is too long or too deep.
    """
    if asked is None:
        return None
    param = f"{_RESPONSE_FORMAT}.json_schema"
    if asked.json_schema is None and asked.type == "json_schema":
        raise InvalidRequestError(
            f"{_RESPONSE_FORMAT} of type json_schema needs json_schema: an object with name and "
            "schema.",
            param=param,
        )
    if asked.json_schema is not None and asked.type != "json_schema":
        raise InvalidRequestError(
            f"{_RESPONSE_FORMAT} of type {asked.type} takes no json_schema. Leave it out, or say "
            "type json_schema.",
            param=param,
        )
    if asked.json_schema is not None:
        _check_schema(asked.json_schema.definition, f"{param}.schema")
        return asked.json_schema.definition
    return {"type": "object"} if asked.type == "json_object" else None


def spaced(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a schema whose JSON has bounded white space; its own `x-guidance` stands instead."""
    return {"x-guidance": _SPACING, **schema}


def _of_format(asked: ResponseFormat) -> Constraint | None:
    schema = format_schema(asked)
    is_named = asked.json_schema is not None
    param = f"{_RESPONSE_FORMAT}.json_schema.schema" if is_named else _RESPONSE_FORMAT
    return None if schema is None else _of_schema(schema, param)


def _of_structured(asked: StructuredOutputs) -> Constraint:
    fields = (asked.schema_, asked.regex, asked.choice, asked.grammar)
    if sum(value is not None for value in fields) != 1:
        raise InvalidRequestError(
            "structured_outputs takes exactly one of json, regex, choice and grammar.",
            param=STRUCTURED_OUTPUTS,
        )
    if asked.schema_ is not None:
        param = f"{STRUCTURED_OUTPUTS}.json"
        given = asked.schema_
        return _of_schema(_parsed(given, param) if isinstance(given, str) else given, param)
    if asked.regex is not None:
        return _of_regex(asked.regex)
    if asked.choice is not None:
        return _of_text("choice", json.dumps(asked.choice, ensure_ascii=False))
    assert asked.grammar is not None
    # llguidance looks for Lark with a pattern that is quadratic in blank lines, holding the
    # interpreter: 24 s for 60,000 of them.
    lines = (line for line in asked.grammar.split("\n") if line.strip())
    return _of_text("grammar", "\n".join(lines))


def _of_regex(regex: str) -> Constraint:
    if (len(regex) - len(regex.rstrip("\\"))) % 2:  # llguidance would leave the last one out
        param = f"{STRUCTURED_OUTPUTS}.regex"
        raise InvalidRequestError(f"{param} ends inside an escape.", param=param)
    return _of_text("regex", regex)


def _of_text(kind: Literal["regex", "choice", "grammar"], text: str) -> Constraint:
    """Returns what llguidance, too, calls by this name; its "grammar" is Lark or GBNF."""
    param = f"{STRUCTURED_OUTPUTS}.{kind}"
    _check_length(text, param)
    try:
        return Constraint(llguidance.grammar_from(kind, text), param)
    except ValueError as error:
        raise InvalidRequestError(f"{param}: {error!s:.200}.", param=param) from error


def _of_schema(schema: Mapping[str, Any], param: str) -> Constraint:
    _check_schema(schema, param)
    return Constraint(llguidance.grammar_from("json_schema", _text_of(spaced(schema))), param)


def _check_schema(schema: Mapping[str, Any], param: str) -> None:
    """Refuses a schema that is too deep or too long as text."""
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise InvalidRequestError(
            f"{param} is nested deeper than {MAX_SCHEMA_DEPTH} levels. Flatten it.", param=param
        )
    _check_length(_text_of(schema), param)


def _text_of(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _parsed(text: str, param: str) -> Mapping[str, Any]:
    try:
        schema = strict_json.parse(text.encode())
    except ValueError as error:
        raise InvalidRequestError(f"{param} is not JSON: {error!s:.200}.", param=param) from error
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{param} is no JSON object.", param=param)
    return schema


def _check_length(text: str, param: str) -> None:
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequestError(
            f"{param} has {len(text)} characters; at most {MAX_SCHEMA_CHARS} are compiled. "
            "Shorten it.",
            param=param,
        )
