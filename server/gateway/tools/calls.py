"""Calls as JSON: where one ends, and what it says. Knows no request and no protocol."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from linker_core.weights import strict_json

MAX_DEPTH: Final = strict_json.MAX_DEPTH
_ARGUMENTS: Final = ("arguments", "parameters")
_KNOWN_KEYS: Final = frozenset({"name", "type", "id", *_ARGUMENTS})
_BLANK: Final = " \t\r\n"
# A string that nothing closes reaches to the end, so that no character is looked at twice.
_STRINGS: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
# Models write these as they are, which JSON does not: it escapes them.
_CONTROLS: Final = {ord(char): json.dumps(char)[1:-1] for char in "\t\n\r"}


class Call(NamedTuple):
    """A call of a function."""

    name: str
    arguments: str  # a JSON object, but for its escapes as the model wrote it


class _Written(NamedTuple):
    """A value, and the JSON that it was."""

    value: Any
    text: str


_Members = Mapping[str, _Written]


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
        if char < " " and char not in "\t\n\r":
            return Progress.BROKEN
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_text = False
        return Progress.OPEN


def read_calls(text: str, names: Collection[str], *, is_marked: bool) -> tuple[Call, ...] | None:
    """Returns the calls that a JSON object or array holds; None if it is anything else.

    Args:
        text: What `JsonSpan` has followed to its end.
        names: Functions that may be called.
        is_marked: Whether the model has said that these are calls; then they may leave arguments
            out.
    """
    try:
        value = _decoder.decode(text)
    except ValueError:
        return None
    records = value if isinstance(value, list) else [value]
    if not records or not all(isinstance(record, dict) for record in records):
        return None
    calls: list[Call] = []
    for members in _objects(text):
        call = _call(members, names, is_marked=is_marked)
        if call is None:
            return None
        calls.append(call)
    return tuple(calls)


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
    object_pairs_hook=_unique_pairs, parse_float=_finite, parse_constant=_finite, strict=False
)


def _call(members: _Members, names: Collection[str], *, is_marked: bool) -> Call | None:
    """Returns the call that an object is; None if it is none, or says more than one thing."""
    members, function = dict(members), members.get("function")
    if function is not None:  # around a call, or instead of its name
        del members["function"]
        is_around = isinstance(function.value, dict)
        inner = _members(function.text, 0)[0] if is_around else {"name": function}
        if inner.keys() & members.keys():
            return None
        members |= inner
    name, kind = members.get("name"), members.get("type")
    if not members.keys() <= _KNOWN_KEYS or (kind is not None and kind.value != "function"):
        return None
    if name is None or not isinstance(name.value, str) or name.value not in names:
        return None
    given = [members[key] for key in _ARGUMENTS if key in members]
    if len(given) > 1 or not (given or is_marked):
        return None
    arguments = _arguments(given[0]) if given else "{}"
    return None if arguments is None else Call(name.value, arguments)


def _arguments(given: _Written) -> str | None:
    """Returns arguments as JSON, be they an object, a text that holds one, or nothing."""
    if isinstance(given.value, dict):
        return _escaped(given.text)
    if not isinstance(given.value, str | None):
        return None
    text = _escaped(given.value or "{}")
    return text if _is_object(text) else None


def _is_object(text: str) -> bool:
    """Says whether a text is a JSON object that clients can be sent."""
    text, span = text.strip(_BLANK), JsonSpan()
    if text[:1] != "{" or any(span.take(char) is not Progress.OPEN for char in text[:-1]):
        return False  # or too deep for the decoder
    try:
        text.encode()  # half a surrogate pair is no text
        _decoder.decode(text)
    except ValueError:
        return False
    return True


def _escaped(text: str) -> str:
    return _STRINGS.sub(lambda string: string.group().translate(_CONTROLS), text)


def _objects(text: str) -> Iterator[_Members]:
    """Yields the members of each object of a text that is known to hold nothing else."""
    at = 0
    while (at := text.find("{", at)) >= 0:
        members, at = _members(text, at)
        yield members


def _members(text: str, at: int) -> tuple[_Members, int]:
    """Returns the members of the object that begins at a place, and where it ends."""
    members: dict[str, _Written] = {}
    at += 1
    while text[at := _past_blank(text, at)] != "}":
        if text[at] == ",":
            at += 1
            continue
        key, at = _decoder.raw_decode(text, at)
        at_value = _past_blank(text, _past_blank(text, at) + 1)  # behind the colon
        value, at = _decoder.raw_decode(text, at_value)
        members[key] = _Written(value, text[at_value:at])
    return members, at


def _past_blank(text: str, at: int) -> int:
    while text[at] in _BLANK:
        at += 1
    return at
