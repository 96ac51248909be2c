"""Token ids of one growing sequence to text that may be sent now. Knows no model, no protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# An unfinished UTF-8 character has at most three bytes. Byte-level decoders show them as one
# replacement character; byte-fallback decoders as one each, and with them all bytes before.
_MAX_UNDECIDED_CHARS: Final = 3
# A suffix of the tokens decodes to a suffix of the text once it is a few bytes long, since UTF-8
# finds its character boundaries again. Every kept token has a byte or more.
_MIN_WINDOW: Final = 8
_MAX_WINDOW: Final = 16


class Detokenizer:
    """Turns tokens into text as they come; the pieces add up to the decoding of all of them.

    Text is held back while it could still change (an unfinished character) or could still become
    a stop string. Each token costs the decoding of at most `_MAX_WINDOW` tokens.

    Byte-fallback decoders (SentencePiece style) void a whole run of byte tokens when a later one
    breaks it. Characters that were complete before are sent all the same, so there, and only
    there, the pieces may hold other replacement characters than the decoding of all tokens.

    Attributes:
        stopped: Whether a stop string was met; nothing comes after it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        """Starts an empty sequence.

        Args:
            tokenizer: The model's.
            stop: Texts that end the answer; it ends where the first of them is complete.
            skip_special_tokens: Whether special tokens give no text.
            include_stop: Whether the stop string itself belongs to the text.

        Raises:
            InvalidRequestError: A stop string is empty.
        """
        if not all(stop):
            raise InvalidRequestError("a stop string is empty; leave it out", param="stop")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._window: list[int] = []  # the latest tokens, what comes before is decided
        self._decided = ""  # the part of the window's text that went on to the stop check
        self._num_voided = 0  # tokens in a row after which the window's text denies `_decided`
        self._pending = ""  # decided, but the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that may be sent now, often empty."""
        if self.stopped or token_id in self._skipped_ids:
            return ""
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
        return self._release(decided[num_before:])

    def finish(self) -> str:
        """Returns the text that was held back; the sequence ends here."""
        if self.stopped:
            return ""
        rest = self._decode(self._window)[len(self._decided) :]
        self._window.clear()
        self._decided = ""
        text = self._release(rest) + self._pending
        self._pending = ""
        return text

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

    def _release(self, decided: str) -> str:
        """Returns what is certainly before any stop string; notices a complete one."""
        if not self._stop:
            return decided
        text = self._pending + decided
        # The stop string that is complete first ends the text, however the tokens were cut; of
        # those that are complete at once, the one that began first.
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            end, start = min(ends)
            self.stopped = True
            self._pending = ""
            return text[: end if self._include_stop else start]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._pending = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`, but is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
