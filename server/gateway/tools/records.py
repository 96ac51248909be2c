"""One choice's calls as OpenAI's records, whole and streamed."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from server.gateway.tools.pieces import AnswerParser, CallBegun, Content, Piece

Json = dict[str, Any]


class ChoiceCalls:
    """Turns the text of one choice into its message, or into the deltas of one.

    Args:
        parser: At the start of the choice's text.
    """

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._num_calls = 0  # that have begun

    @property
    def has_called(self) -> bool:
        """Whether there are calls, and all of them are whole."""
        return self._num_calls > 0 and self._parser.is_sound

    def message(self, text: str) -> Json:
        """Returns the message that a whole text is."""
        content: list[str] = []
        calls: list[Json] = []
        for piece in (*self._parser.push(text), *self._parser.finish()):
            if isinstance(piece, Content):
                content.append(piece.text)
            elif isinstance(piece, CallBegun):
                calls.append(self._begun(piece))
            else:
                calls[-1]["function"]["arguments"] += piece.text
        message: Json = {"role": "assistant", "content": "".join(content), "refusal": None}
        if calls:
            message |= {"content": message["content"] or None, "tool_calls": calls}
        return message

    def deltas(self, text: str, *, is_last: bool) -> list[Json]:
        """Returns what the next part of the text shows.

        Args:
            text: May be empty.
            is_last: Whether the choice ends with it.
        """
        pieces = self._parser.push(text)
        return list(self._deltas([*pieces, *self._parser.finish()] if is_last else pieces))

    def _deltas(self, pieces: Iterable[Piece]) -> Iterator[Json]:
        for piece in pieces:
            if isinstance(piece, Content):
                yield {"content": piece.text}
                continue
            if isinstance(piece, CallBegun):
                call = self._begun(piece)
            else:
                call = {"function": {"arguments": piece.text}}
            yield {"tool_calls": [{"index": self._num_calls - 1, **call}]}

    def _begun(self, call: CallBegun) -> Json:
        self._num_calls += 1
        return {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
