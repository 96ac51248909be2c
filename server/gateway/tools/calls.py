"""Calls as JSON: where one ends, and what it says. Knows no request and no protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from linker_core.weights import strict_json

MAX_DEPTH: Final = strict_json.MAX_DEPTH
_ARGUMENTS: Final = ("arguments", "parameters")
_KNOWN_KEYS: Final = frozenset({"name", "type", "id", *_ARGUMENTS})
_BLANK: Final = " \t\r\n"
_LAST_CONTROL: Final = "\x1f"


class Call(NamedTuple):
    """A call of a function."""

    name: str
    arguments: str  # JSON, as the model wrote it


class Progress(Enum):
    """How far a JSON value has come."""

    OPEN = auto()
    ENDED = auto()
    BROKEN = auto()  # it cannot become one


class JsonSpan:
    """Follows one JSON object or array, a character at a time, to where it ends."""

    __slots__ = ("_closers", "_is_escaped", "_is_text")

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._is_text = False
        self._is_escaped = False

    def take(self, char: str) -> Progress:
        """Follows the next character; the first one opens the value."""
        if self._is_text:
            return self._take_text(char)
        if char == '"':
            self._is_text = True
        elif char in "{[":
            self._closers.append("}" if char == "{" else "]")
            if len(self._closers) > MAX_DEPTH:
                return Progress.BROKEN
        elif char in "}]":
            if self._closers.pop() != char:
                return Progress.BROKEN
            if not self._closers:
                return Progress.ENDED
        return Progress.OPEN

    def _take_text(self, char: str) -> Progress:
        if char <= _LAST_CONTROL:  # JSON escapes them
            return Progress.BROKEN
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_text = False
        return Progress.OPEN


def read_calls(text: str, names: Collection[str]) -> tuple[Call, ...] | None:
    """Returns the calls that a JSON object or array holds; None if it is anything else.

    Args:
        text: What `JsonSpan` has followed to its end.
        names: Functions that may be called.
    """
    try:
        value = _decoder.decode(text)
    except ValueError:
        return None
    records = value if isinstance(value, list) else [value]
    if not records or not all(_is_call(record, names) for record in records):
        return None
    return tuple(_calls(text))


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key appears twice")
    return record


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("no finite number")
    return value


# Depths are bounded before it reads anything.
_decoder = json.JSONDecoder(
    object_pairs_hook=_unique_pairs, parse_float=_finite, parse_constant=_finite
)


def _is_call(record: object, names: Collection[str]) -> bool:
    if not isinstance(record, dict) or not record.keys() <= _KNOWN_KEYS:
        return False
    given = [record[key] for key in _ARGUMENTS if key in record]
    name = record.get("name")
    return (
        isinstance(name, str)
        and name in names
        and record.get("type", "function") == "function"
        and len(given) == 1
        and isinstance(given[0], dict)
    )


def _calls(text: str) -> Iterator[Call]:
    """Yields the calls of a text that is known to hold nothing else."""
    at = 0
    while (at := text.find("{", at)) >= 0:
        name, arguments = "", ""
        at += 1
        while text[at := _past_blank(text, at)] != "}":
            if text[at] == ",":
                at += 1
                continue
            key, value, at_value, at = _member(text, at)
            if key == "name":
                name = value
            elif key in _ARGUMENTS:
                arguments = text[at_value:at]
        yield Call(name, arguments)


def _member(text: str, at: int) -> tuple[str, Any, int, int]:
    """Returns a member's key and value, and where the value's text begins and ends."""
    key, at = _decoder.raw_decode(text, at)
    at_value = _past_blank(text, _past_blank(text, at) + 1)  # behind the colon
    value, at = _decoder.raw_decode(text, at_value)
    return key, value, at_value, at


def _past_blank(text: str, at: int) -> int:
    while text[at] in _BLANK:
        at += 1
    return at
