"""Answers that have to be calls of tools: the grammar they follow, and how they are read.

Since the grammar fixes every character but the arguments, these are shown as they come.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final

from server.gateway.schemas.tools import Function
from server.gateway.tools.calls import JsonSpan, Progress
from server.gateway.tools.pieces import Arguments, CallBegun, Content, Piece
from server.gateway.tools.wire import WireFormat

# As models write JSON, since they have read it so; it leaves no room for more blanks.
_SPACING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def calls_grammar(wire: WireFormat, functions: Sequence[Function], *, only_one: bool) -> str:
    """Returns the grammar, in Lark, of an answer that is calls and nothing else.

    Args:
        wire: How the model writes calls.
        functions: What may be called.
        only_one: Whether the answer is one call; otherwise it is one or more.
    """
    more = "" if only_one else f" ({_literal(wire.separator)} call)*"
    start = f"start: {_literal(wire.opening)} call{more} {_literal(wire.ending)}"
    return "\n".join([start, *call_rules(wire, functions)])


def call_rules(
    wire: WireFormat, functions: Sequence[Function], *, before: str | None = None
) -> list[str]:
    """Returns the rule `call` and those that it uses.

    Args:
        wire: How the model writes calls.
        functions: What may be called.
        before: What is left to write before a call's name, if not all of it.
    """
    names = [f"{_literal(one.name + wire.between)} a{i}" for i, one in enumerate(functions)]
    opening = _literal(wire.before if before is None else before)
    return [
        f"call: {opening} ({' | '.join(names)}) {_literal(wire.after)}",
        *(f"a{i}: %json {_schema_of(one)}" for i, one in enumerate(functions)),
    ]


def _literal(text: str) -> str:
    return json.dumps(text)


def _schema_of(function: Function) -> str:
    schema: Mapping[str, Any] = {"additionalProperties": False}
    if function.parameters is not None:
        schema = function.parameters
    # Who does not ask for strictness is not refused for what cannot be enforced.
    options = _SPACING if function.strict else {**_SPACING, "lenient": True}
    return json.dumps({**schema, "type": "object", "x-guidance": options}, ensure_ascii=False)


class ForcedCalls:
    """Parses an answer that follows `calls_grammar`, and may be cut short.

    Args:
        wire: How the model writes calls.

    Attributes:
        is_sound: Whether all calls that have begun are whole.
    """

    def __init__(self, wire: WireFormat) -> None:
        self.is_sound = True
        self._wire = wire
        self._pieces: list[Piece] = []
        self._arguments: list[str] = []  # that have not been shown
        self._held: list[str] = []  # of what is to be a call, but has no name yet, or of its end
        self._parsing = self._parse()
        next(self._parsing)

    def push(self, text: str) -> list[Piece]:
        """Returns what is certain with the next part of the text."""
        for char in text:
            self._parsing.send(char)
        self._show_arguments()
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        """Returns nothing: the grammar's own words, cut short, say nothing."""
        return []

    def _parse(self) -> Generator[None, str, None]:
        """Takes the answer's characters one by one."""
        wire = self._wire
        char = yield from self._past(wire.opening + wire.before, (yield))
        while True:
            name: list[str] = []
            while char != '"':
                name.append(char)
                self._held.append(char)
                char = yield
            char = yield from self._past(wire.between, char)
            if char != "{":
                yield from self._only_content(char)
            self._pieces.append(CallBegun("".join(name)))
            self._held.clear()
            self.is_sound, span = False, JsonSpan()
            self._arguments.append(char)
            while (progress := span.take(char)) is Progress.OPEN:
                char = yield
                self._arguments.append(char)
            self._show_arguments()
            self.is_sound = progress is Progress.ENDED
            char = yield from self._past(wire.after, (yield))
            self._held.clear()
            if char != wire.separator[0]:
                break
            char = yield from self._past(wire.separator + wire.before, char)
        char = yield from self._past(wire.ending, char)
        self._held.clear()
        yield from self._only_content(char)

    def _past(self, literal: str, char: str) -> Generator[None, str, str]:
        """Takes what the grammar has written, and returns the character behind it."""
        for expected in literal:
            if char != expected:
                yield from self._only_content(char)
            self._held.append(char)
            char = yield
        return char

    def _only_content(self, char: str) -> Generator[None, str, None]:
        """Takes what is held, and whatever comes, as content: the grammar has not written it."""
        char = "".join(self._held) + char
        while True:
            self._pieces.append(Content(char))
            char = yield

    def _show_arguments(self) -> None:
        if self._arguments:
            self._pieces.append(Arguments("".join(self._arguments)))
            self._arguments = []
