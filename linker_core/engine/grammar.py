"""What constrains one answer: a matcher that llguidance runs, and the tokens it allows next.

Rules about the end of an answer: the model's own end tokens may come only when the grammar is
complete, whatever they are called; the user's stop ids may come then too, and earlier only where
the grammar itself allows them as text.

llguidance is imported with the first grammar, since a machine that only computes may lack it.

Legend: G constrained rows, V columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from linker_core.errors import InvalidRequestError

if TYPE_CHECKING:
    import llguidance

GRAMMAR_PARAM = "structured_outputs"
_WORD_BITS = 32
_REGEX_FAULT = "error: "
_MAX_REASON = 200  # characters of llguidance's message that are passed on


class Matcher:
    """Follows one answer through its grammar.

    Args:
        inner: llguidance's matcher, at the start of the answer and without error.
        tokenizer: What it was made for.
        end_ids: The model's own end tokens.
        stop_ids: The ids that end this answer.
        width: Of the model's logits; ids beyond are ignored.
    """

    def __init__(
        self,
        inner: llguidance.LLMatcher,
        tokenizer: llguidance.LLTokenizer,
        *,
        end_ids: Iterable[int],
        stop_ids: Iterable[int],
        width: int,
    ) -> None:
        assert not inner.is_error()
        self.inner = inner
        self.num_tokens = tokenizer.vocab_size
        self._end_ids = [token for token in end_ids if 0 <= token < width]
        # Models with the same tokenizer share it, each with end tokens of its own.
        self._hidden_ids = [*self._end_ids, *(t for t in tokenizer.eos_tokens if t < width)]
        self._stop_ids = [token for token in stop_ids if 0 <= token < width]
        self._width = width

    @property
    def is_exhausted(self) -> bool:
        """Whether the answer is complete and nothing but its end can follow."""
        return self.inner.is_stopped() and self.inner.is_accepting()

    def take(self, token_id: int) -> bool:
        """Follows a chosen token and says whether it ends the answer.

        Raises:
            InvalidRequestError: The grammar cannot be followed any further.
        """
        if token_id in self._stop_ids or token_id in self._end_ids:
            return True
        if not self.inner.consume_token(token_id):
            raise unfollowable(self.inner.get_error())
        return False

    def restrict(self, allowed_V: npt.NDArray[np.bool_]) -> None:
        """Turns what llguidance allows into what may come next, in place."""
        allowed_V[self._width :] = False
        allowed_V[self._hidden_ids] = False
        if self.inner.is_error():  # llguidance then allows the end alone
            allowed_V[:] = False
        elif self.inner.is_accepting():
            can_go_on = bool(allowed_V.any())
            allowed_V[self._stop_ids] = True
            if not can_go_on:
                allowed_V[self._end_ids] = True


class GrammarMasks:
    """Computes what many matchers allow at once. Owns threads, started when they are needed."""

    def __init__(self) -> None:
        self._executor: llguidance.LLExecutor | None = None

    def allowed(self, matchers: Sequence[Matcher], num_columns: int) -> npt.NDArray[np.bool_]:
        """Returns which tokens may come next, [G, V]; a row of a dead end has none."""
        import llguidance.numpy  # noqa: PLC0415 - with the first grammar

        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        allowed_GV = np.zeros((len(matchers), num_columns), dtype=np.bool_)
        # Tokenizers of different sizes want masks of different sizes.
        for size in {matcher.num_tokens for matcher in matchers}:
            rows = [row for row, matcher in enumerate(matchers) if matcher.num_tokens == size]
            words = np.zeros((len(rows), -(-size // _WORD_BITS)), dtype=np.int32)
            llguidance.numpy.fill_next_token_bitmask_par(
                self._executor, [(matchers[row].inner, i) for i, row in enumerate(rows)], words
            )
            bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=size)
            allowed_GV[rows, :size] = bits[:, :num_columns]
        for row, matcher in enumerate(matchers):
            matcher.restrict(allowed_GV[row])
        return allowed_GV


def unfollowable(reason: str) -> InvalidRequestError:
    """Returns the error of an answer that its grammar has led to a dead end."""
    return InvalidRequestError(
        "The answer cannot go on within the grammar"
        f"{': ' if reason else ''}{_first_line(reason)}. Simplify it, or relax other limits on "
        "tokens.",
        param=GRAMMAR_PARAM,
    )


def uncompilable(reason: str) -> InvalidRequestError:
    """Returns the error of a grammar that is none."""
    return InvalidRequestError(
        f"The grammar cannot be compiled: {_fault_line(reason)}. Correct or simplify it.",
        param=GRAMMAR_PARAM,
    )


def _fault_line(reason: str) -> str:
    """Returns the line that says what is wrong: of a regular expression it comes far below."""
    said = [line for line in reason.splitlines() if line.startswith(_REGEX_FAULT)]
    if said:
        place = reason.partition(": ")[0]
        return _first_line(f"{place}: the regular expression has an {said[-1]}")
    return _first_line(reason)


def _first_line(reason: str) -> str:
    return reason.partition("\n")[0][:_MAX_REASON].rstrip(". ")
