"""What the text of an answer turns out to be: content, and calls of tools piece by piece."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Content(NamedTuple):
    """Text for the reader."""

    text: str


class CallBegun(NamedTuple):
    """A call of a function; its arguments follow."""

    name: str


class Arguments(NamedTuple):
    """The next part of the latest call's arguments, which together are JSON."""

    text: str


Piece = Content | CallBegun | Arguments


class AnswerParser(Protocol):
    """Takes an answer's text as it comes. However it is cut, the pieces add up to the same."""

    @property
    def is_sound(self) -> bool:
        """Whether all calls that have begun are whole."""

    def push(self, text: str) -> list[Piece]:
        """Returns what is certain with the next part of the text."""

    def finish(self) -> list[Piece]:
        """Returns what was held back; the answer ends here."""
