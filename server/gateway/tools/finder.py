"""Finds calls of tools in an answer that may hold some, or none. Knows no protocol.

A call is shown once it is whole and sound; everything else is content, as it was written. Blank
text around calls belongs to them, as does what separates those without a mark. Each character is
looked at a bounded number of times, however the answer is written and cut.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto
from typing import Final

from server.gateway.tools.calls import Call, JsonSpan, Progress, read_calls
from server.gateway.tools.pieces import Arguments, CallBegun, Content, Piece
from server.gateway.tools.wire import WireFormat

MAX_CALL_CHARS: Final = 128 * 1024
_BLANK: Final = " \t\r\n"
_BETWEEN_BARE: Final = _BLANK + ";,"


class _Mode(Enum):
    TEXT = auto()
    MARKED = auto()  # behind a marker, before the JSON
    JSON = auto()
    CLOSING = auto()  # behind the JSON, before its closing tag


class CallFinder:
    """Parses an answer that is free to call tools.

    Args:
        wire: How the model writes calls; it has a marker.
        names: Functions that may be called; what calls another is content.
    """

    def __init__(self, wire: WireFormat, names: Collection[str]) -> None:
        assert wire.marker is not None
        self._wire = wire
        self._marker = wire.marker
        self._names = names
        self._mode = _Mode.TEXT
        self._pieces: list[Piece] = []
        self._num_matched = 0  # characters of the marker, or of the closing tag
        self._has_called = False
        # Since the start or the last call, where nothing else has come; then None.
        self._blanks: list[str] | None = []
        self._held: list[str] = []  # of what may be a call
        self._num_held = 0
        self._json_at = 0  # its place among what is held
        self._span = JsonSpan()
        self._calls: tuple[Call, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether all calls that have begun are whole: others are not shown."""
        return True

    def push(self, text: str) -> list[Piece]:
        """Returns what is certain with the next part of the text."""
        self._feed(text)
        return self._taken()

    def finish(self) -> list[Piece]:
        """Returns what was held back; the answer ends here."""
        if self._mode is _Mode.CLOSING:
            self._accept()
        elif self._mode is not _Mode.TEXT:
            self._give_up()
        else:
            self._add_content(self._marker[: self._num_matched])
        if self._blanks and not self._has_called:
            self._pieces.append(Content("".join(self._blanks)))
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _feed(self, text: str) -> None:
        steps = {
            _Mode.TEXT: self._in_text,
            _Mode.MARKED: self._behind_marker,
            _Mode.JSON: self._in_json,
            _Mode.CLOSING: self._before_closing,
        }
        at = 0
        while at < len(text):
            at = steps[self._mode](text, at)

    def _in_text(self, text: str, at: int) -> int:
        if self._num_matched:
            return self._in_marker(text, at)
        if self._wire.is_bare and self._blanks is not None:
            if text[at] in "{[":
                self._mode = _Mode.JSON
                return at
            if text[at] in (_BETWEEN_BARE if self._has_called else _BLANK):
                self._blanks.append(text[at])
                return at + 1
        found = text.find(self._marker[0], at)
        end = len(text) if found < 0 else found
        self._add_content(text[at:end])
        if found < 0:
            return end
        self._num_matched = 1
        return end + 1

    def _in_marker(self, text: str, at: int) -> int:
        if text[at] != self._marker[self._num_matched]:
            # Only the marker's first character can begin another, and it does not come again in it.
            self._add_content(self._marker[: self._num_matched])
            self._num_matched = 0
            return at
        self._num_matched += 1
        if self._num_matched == len(self._marker):
            self._num_matched = 0
            self._hold(self._marker)
            self._mode = _Mode.MARKED
        return at + 1

    def _behind_marker(self, text: str, at: int) -> int:
        if text[at] in "{[":
            self._json_at = len(self._held)
            self._mode = _Mode.JSON
            return at
        if text[at] not in _BLANK or self._num_held == MAX_CALL_CHARS:
            self._give_up()
            return at
        self._hold(text[at])
        return at + 1

    def _in_json(self, text: str, at: int) -> int:
        start = at
        stop = min(len(text), at + MAX_CALL_CHARS - self._num_held)
        progress = Progress.OPEN if at < stop else Progress.BROKEN
        while progress is Progress.OPEN and at < stop:
            progress = self._span.take(text[at])
            at += 1
        self._hold(text[start:at])
        if progress is Progress.BROKEN:
            self._give_up()
        elif progress is Progress.ENDED:
            self._read_json()
        return at

    def _read_json(self) -> None:
        text = "".join(self._held[self._json_at :])
        calls = read_calls(text, self._names, is_marked=self._json_at > 0)
        if calls is None:
            self._give_up()
            return
        self._calls = calls
        if self._json_at and self._wire.closing is not None:
            self._mode = _Mode.CLOSING
        else:
            self._accept()

    def _before_closing(self, text: str, at: int) -> int:
        closing, num_matched = self._wire.closing, self._num_matched
        assert closing is not None
        if text[at] == closing[num_matched]:
            self._num_matched += 1
            if self._num_matched == len(closing):
                self._accept()
            return at + 1
        if not num_matched and text[at] in _BLANK and self._num_held < MAX_CALL_CHARS:
            self._hold(text[at])
            return at + 1
        self._give_up()
        self._feed(closing[:num_matched])  # it may begin a marker
        return at

    def _hold(self, text: str) -> None:
        self._held.append(text)
        self._num_held += len(text)

    def _accept(self) -> None:
        """Shows the calls that are whole."""
        for call in self._calls:
            self._pieces += (CallBegun(call.name), Arguments(call.arguments))
        self._has_called = True
        self._blanks = []
        self._reset()

    def _give_up(self) -> None:
        """Shows what is held as content, since it is no call."""
        held = "".join(self._held)
        self._reset()
        self._add_content(held)

    def _reset(self) -> None:
        self._mode = _Mode.TEXT
        self._num_matched = 0
        self._held, self._num_held, self._json_at = [], 0, 0
        self._span = JsonSpan()
        self._calls = ()

    def _add_content(self, text: str) -> None:
        if not text:
            return
        if self._blanks is not None:
            self._blanks.append(text)
            if text.isspace():
                return
            text, self._blanks = "".join(self._blanks), None
        self._pieces.append(Content(text))
