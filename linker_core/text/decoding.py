"""Token ids of one growing sequence to the text that no later token changes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final, Protocol

from linker_core.text.byte_tokens import ByteTokens
from linker_core.text.tokenizer import Tokenizer

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# An unfinished UTF-8 character has at most three bytes. Byte-level decoders show them as one
# replacement character; byte-fallback decoders as one each, and with them all bytes before.
_MAX_UNDECIDED_CHARS: Final = 3
# A suffix of the tokens decodes to a suffix of the text once it is a few bytes long, since UTF-8
# finds its character boundaries again. Every kept token has a byte or more.
_MIN_WINDOW: Final = 8
_MAX_WINDOW: Final = 16


class Decoding(Protocol):
    """The decoding of one sequence; the pieces add up to that of all of its tokens."""

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that is certain by now."""

    def finish(self) -> str:
        """Returns the text that was not; the sequence ends here."""


def decoding_of(tokenizer: Tokenizer) -> Decoding:
    """Returns the decoding of a new sequence."""
    if tokenizer.byte_tokens is None:
        return WindowDecoding(tokenizer)
    return ByteDecoding(tokenizer.byte_tokens)


class ByteDecoding:
    """Joins the bytes of tokens; each costs a look into a table.

    Args:
        tokens: Of the tokenizer.
    """

    def __init__(self, tokens: ByteTokens) -> None:
        self._tokens = tokens
        self._rest = b""  # the beginning of a character

    def push(self, token_id: int) -> str:
        piece = self._tokens[token_id]
        if isinstance(piece, str):
            if not self._rest:
                return piece
            piece = piece.encode()
        data = self._rest + piece
        text, num_read = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[num_read:]
        return text

    def finish(self) -> str:
        text, self._rest = self._rest.decode(errors="replace"), b""
        return text


class WindowDecoding:
    """Decodes the latest tokens again with each new one: of those, at most `_MAX_WINDOW`.

    Byte-fallback decoders (SentencePiece style) void a whole run of byte tokens when a later one
    breaks it. Characters that were complete before are sent all the same, so there, and only
    there, the pieces may hold other replacement characters than the decoding of all tokens.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the latest tokens, what comes before is decided
        self._decided = ""  # the part of the window's text that was returned
        self._num_voided = 0  # tokens in a row after which the window's text denies `_decided`

    def push(self, token_id: int) -> str:
        if not self._tokenizer.has_token(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_undecided = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_UNDECIDED_CHARS)
        if num_undecided and self._may_be_mended(text):
            return ""
        self._num_voided = 0
        decided, num_before = text[: len(text) - num_undecided], len(self._decided)
        self._decided = decided
        if len(self._window) > _MAX_WINDOW:
            self._shorten_window(text, num_undecided)
        return decided[num_before:]

    def finish(self) -> str:
        rest = self._decode(self._window)[len(self._decided) :]
        self._window.clear()
        self._decided = ""
        return rest

    def _may_be_mended(self, text: str) -> bool:
        """Says whether broken bytes that void decided text may still become a character."""
        if text.startswith(self._decided):
            return False
        self._num_voided += 1
        return self._num_voided <= _MAX_UNDECIDED_CHARS

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _shorten_window(self, text: str, num_undecided: int) -> None:
        """Forgets the oldest tokens, at a character's boundary if one is near."""
        nearest = len(self._window) - _MIN_WINDOW
        for start in range(nearest, nearest - 4, -1):  # a character has at most four tokens
            suffix = self._decode(self._window[start:])
            if text.endswith(suffix):
                break
        else:
            start = nearest
            suffix = self._decode(self._window[start:])
        self._window = self._window[start:]
        self._decided = suffix[: len(suffix) - num_undecided]
