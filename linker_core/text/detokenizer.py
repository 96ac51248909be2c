"""Token ids of one growing sequence to text that may be sent now. Knows no model, no protocol."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from linker_core.errors import InvalidRequestError
from linker_core.text.decoding import decoding_of
from linker_core.text.tokenizer import Tokenizer

_REMEMBERED_STOPS: Final = 256


class Detokenizer:
    """Turns tokens into text as they come; the pieces add up to the decoding of all of them.

    Text is held back while it could still change (an unfinished character) or could still become
    a stop string. What a token costs does not depend on how many came before it.

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
        self._stop = tuple(stop)
        self._borders = [_borders(one) for one in stop]
        self._begun = [0] * len(stop)  # of each stop string, what the text so far ends with
        self._include_stop = include_stop
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoding = decoding_of(tokenizer)
        self._pending = ""  # certain, but the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that may be sent now, often empty."""
        if self.stopped or token_id in self._skipped_ids:
            return ""
        text = self._decoding.push(token_id)
        return self._release(text) if self._stop else text

    def finish(self) -> str:
        """Returns the text that was held back; the sequence ends here."""
        if self.stopped:
            return ""
        text = self._release(self._decoding.finish()) + self._pending
        self._pending = ""
        return text

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
        self._begun = [
            _begun(*state, decided)
            for state in zip(self._stop, self._borders, self._begun, strict=True)
        ]
        num_held = max(self._begun)
        self._pending = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _begun(stop: str, borders: Sequence[int], num_begun: int, text: str) -> int:
    """Returns how many characters of `stop` a growing text ends with (Knuth, Morris, Pratt).

    However both repeat themselves, a character costs a bounded number of steps on the average:
    clients choose the stop strings, and what the model writes.

    Args:
        stop: Not in the text so far, nor in what comes.
        borders: Of it; see `_borders`.
        num_begun: Characters of it that the text so far ends with.
        text: What comes.
    """
    for char in text:
        while num_begun and stop[num_begun] != char:
            num_begun = borders[num_begun - 1]
        if stop[num_begun] == char:
            num_begun += 1
    return num_begun


@lru_cache(_REMEMBERED_STOPS)  # the sequences of a request have the same
def _borders(stop: str) -> tuple[int, ...]:
    """Returns, of every beginning of `stop`, the longest shorter one that it ends with."""
    borders = [0]
    for char in stop[1:]:
        length = borders[-1]
        while length and stop[length] != char:
            length = borders[length - 1]
        borders.append(length + (stop[length] == char))
    return tuple(borders)
