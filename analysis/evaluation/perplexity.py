"""Perplexity on a text in two protocols that must not be compared with each other (FM 3.6).

Sliding: every token but the first is predicted once, from at least window - stride tokens before it
(fewer only at the text's beginning). Full: the text falls into sequences as long as asked, each
read from its own beginning, and all but its first token are predicted. FM's Llama-3 has 8.355 in
the first and 5.907 in the second.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from analysis.evaluation.token_loss import TokenLoss
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError

WINDOW: Final = 2048  # FM's
NUM_TOKENS: Final = 32_768  # FM's, of the sliding protocol


class Protocol(enum.StrEnum):
    """How a text is read."""

    SLIDING = "sliding_window"
    FULL = "full_sequence"


class Span(NamedTuple):
    """Tokens start … stop of a text are read, those from `scored` on are predicted."""

    start: int
    scored: int
    stop: int


class Reading(NamedTuple):
    """A protocol with its lengths."""

    protocol: Protocol
    window: int
    stride: int

    @property
    def words(self) -> str:
        """What was done, for a reader."""
        if self.protocol is Protocol.FULL:
            return f"full sequences of {self.window} tokens"
        return f"windows of {self.window} tokens, stride {self.stride}"

    def spans(self, num_tokens: int) -> Iterator[Span]:
        """Yields what is read of a text."""
        scored = 1
        for start in range(0, num_tokens, self.stride):
            stop = min(start + self.window, num_tokens)
            if self.protocol is Protocol.FULL:
                scored = start + 1
            if scored < stop:
                yield Span(start, scored, stop)
            if stop == num_tokens:
                return
            scored = stop


def sliding(context: int, *, window: int = WINDOW, stride: int | None = None) -> Reading:
    """Returns the sliding protocol as far as a model's context allows.

    FM states no stride; half a window is taken where none is given.

    Raises:
        InvalidRequestError: A stride that is not below the window.
    """
    window = min(window, context)
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride < window:
        raise InvalidRequestError(
            f"--stride is {stride}, expected 1 to {window - 1}: windows of {window} tokens must "
            "overlap, or their first tokens have nothing before them.",
            param="stride",
        )
    return Reading(Protocol.SLIDING, window, stride)


def full(context: int, *, length: int | None = None) -> Reading:
    """Returns the full-sequence protocol; sequences are as long as the context if not stated."""
    length = context if length is None else min(length, context)
    return Reading(Protocol.FULL, length, length)


@torch.no_grad()
def text_loss(model: StudyModel, ids: Sequence[int], reading: Reading) -> TokenLoss:
    """Returns the loss on a text; a unit is a window or a sequence.

    Args:
        model: As it is now.
        ids: At least two tokens.
        reading: Which tokens are read together.
    """
    nats: list[float] = []
    counts: list[int] = []
    for span in reading.spans(len(ids)):
        losses = model.losses(torch.tensor([ids[span.start : span.stop]]))[0]
        scored = losses[span.scored - span.start - 1 :]
        nats.append(float(scored.double().sum()))
        counts.append(len(scored))
    return TokenLoss(nats=tuple(nats), num_tokens=tuple(counts))
