"""Token ids of one growing sequence to text that may be sent now. Knows no model, no protocol."""

from __future__ import annotations

from collections.abc import Sequence

from linker_core.errors import InvalidRequestError
from linker_core.text.decoding import decoding_of
from linker_core.text.tokenizer import Tokenizer


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
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._pending = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`, but is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
