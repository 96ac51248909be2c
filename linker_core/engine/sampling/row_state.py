"""What sampling keeps of one sequence between its steps. Knows no logits.

Everything here follows from the sequence's parameters and tokens, so it outlives a preemption.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from linker_core.engine.grammar import Matcher
from linker_core.engine.messages import SamplingParams
from linker_core.engine.sequence import SequenceState

# Below this a softmax is one-hot to float32, and dividing by it overflows.
GREEDY_TEMPERATURE = 1e-5

Ids = npt.NDArray[np.int64]


class RowState:
    """One sequence's parameters as arrays, and what follows from its tokens so far.

    Args:
        sequence: Whose tokens are to be chosen.
        matcher: What its answer must follow, if anything.
    """

    def __init__(self, sequence: SequenceState, matcher: Matcher | None = None) -> None:
        params = sequence.sampling
        if params.top_k is not None and params.top_k >= sequence.vocab_size:
            params = replace(params, top_k=None)  # it leaves nothing out
        self.sequence = sequence
        self.params = params
        self.width = sequence.vocab_size
        self.matcher = matcher
        self.seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self.is_greedy = params.temperature < GREEDY_TEMPERATURE
        self.stops = as_ids(token for token in params.stop_token_ids if 0 <= token < self.width)
        self.allowed = None
        if params.allowed_token_ids is not None:
            self.allowed = as_ids(params.allowed_token_ids)
        self.bias_ids = as_ids(params.logit_bias)
        self.bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self.bad_tokens = as_ids(word[0] for word in params.bad_words if len(word) == 1)
        self._bad_words = tuple(word for word in params.bad_words if len(word) > 1)
        self._longest_beginning = max(map(len, self._bad_words), default=1) - 1
        self._counts = TokenCounts() if _penalises(params) else None
        self.is_edited = _edits(params) or matcher is not None
        self.is_plain = self.is_greedy and params.logprobs is None and not self.is_edited

    def counts(self) -> TokenCounts | None:
        """Returns how often each token was seen, up to the sequence's last one."""
        if self._counts is not None:
            self._counts.catch_up(self.sequence.tokens, self.sequence.num_prompt)
        return self._counts

    def banned(self) -> list[Ids]:
        """Returns the tokens that must not come next."""
        banned = [self.bad_tokens]
        if self._hides_stops():
            banned.append(self.stops)
        if self._bad_words:
            tokens = self.sequence.tokens
            first = max(self.sequence.num_prompt, len(tokens) - self._longest_beginning)
            output = tokens[first:]
            banned.append(as_ids(w[-1] for w in self._bad_words if _ends_with(output, w[:-1])))
        return banned

    def _hides_stops(self) -> bool:
        if self.sequence.num_output >= self.params.min_tokens:
            return False
        # Behind a complete answer nothing but its end can come, however short it is.
        return self.matcher is None or not self.matcher.is_exhausted


class TokenCounts:
    """The distinct tokens of one sequence, each with how often it was generated.

    Attributes:
        size: Number of distinct tokens.
    """

    def __init__(self) -> None:
        self.size = 0
        self._num_seen = 0
        self._position: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.empty(64, dtype=np.float32)

    @property
    def ids(self) -> Ids:
        """The tokens in the order of their first appearance."""
        return self._ids[: self.size]

    @property
    def num_generated(self) -> npt.NDArray[np.float32]:
        """How often each of them was generated; 0 for those of the prompt alone."""
        return self._counts[: self.size]

    def catch_up(self, tokens: Sequence[int], num_prompt: int) -> None:
        """Counts the tokens that were not there at the last call."""
        for index in range(self._num_seen, len(tokens)):
            self._count(tokens[index], 0 if index < num_prompt else 1)
        self._num_seen = len(tokens)

    def _count(self, token_id: int, times: int) -> None:
        position = self._position.setdefault(token_id, self.size)
        if position == self.size:
            if self.size == len(self._ids):
                self._ids = np.resize(self._ids, 2 * self.size)
                self._counts = np.resize(self._counts, 2 * self.size)
            self._ids[position] = token_id
            self._counts[position] = 0
            self.size += 1
        self._counts[position] += times


def as_ids(tokens: Iterable[int]) -> Ids:
    """Returns token ids as an array."""
    return np.fromiter(tokens, dtype=np.int64)


def _penalises(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _edits(params: SamplingParams) -> bool:
    return (
        _penalises(params)
        or bool(params.logit_bias)
        or params.min_tokens > 0
        or bool(params.bad_words)
        or params.allowed_token_ids is not None
    )


def _ends_with(tokens: Sequence[int], ending: Sequence[int]) -> bool:
    return len(tokens) >= len(ending) and tuple(tokens[-len(ending) :]) == tuple(ending)
