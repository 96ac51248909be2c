"""What one step computes: chunks of sequences, within the step's budget of rows and logits."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from linker_core.engine.sequence import SequenceState
from linker_core.errors import LinkerError


class Scheduled(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence; ask before they are advanced over."""

    sequence: SequenceState
    num_tokens: int

    @property
    def wants_token(self) -> bool:
        """Whether the step completes what is needed to choose the next token."""
        return self.num_tokens == self.sequence.num_missing

    @property
    def num_logits(self) -> int:
        """How many of its last rows need logits."""
        if self.sequence.wants_prompt_rows:
            return self.num_tokens
        return int(self.wants_token)


class Failed(NamedTuple):
    """A sequence that can never run; it is no longer scheduled."""

    sequence: SequenceState
    error: LinkerError


@dataclass(slots=True)
class Schedule:
    """What one step does; `chunks` keep the rows of one slot together, slots ascending."""

    chunks: list[Scheduled] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)


class Taken(NamedTuple):
    """What a sequence was given of a step."""

    num_tokens: int
    num_logits: int


_ONE_ROW = Taken(1, 1)


class Budget:
    """What is left of a step while it is being planned.

    Args:
        num_rows: Tokens it may compute.
        num_logits: Rows of logits it may make.
    """

    def __init__(self, *, num_rows: int, num_logits: int) -> None:
        self.num_rows = num_rows
        self.num_logits = num_logits
        self._taken: dict[SequenceState, Taken] = {}

    def take_one_each(self, decodes: Collection[SequenceState]) -> None:
        """Gives every decoding sequence its row; there is room for all that run."""
        self._taken.update(dict.fromkeys(decodes, _ONE_ROW))
        self.num_rows -= len(decodes)
        self.num_logits -= len(decodes)

    def take(self, sequence: SequenceState) -> int:
        """Gives a sequence as many of its missing tokens as there is room for; returns how many."""
        num_tokens = min(self.num_rows, sequence.num_missing)
        if sequence.wants_prompt_rows:
            num_tokens = min(num_tokens, self.num_logits)
        elif num_tokens == sequence.num_missing and self.num_logits == 0:
            num_tokens -= 1  # the last one would need a row of logits
        if num_tokens > 0:
            taken = Taken(num_tokens, Scheduled(sequence, num_tokens).num_logits)
            self._taken[sequence] = taken
            self.num_rows -= taken.num_tokens
            self.num_logits -= taken.num_logits
        return num_tokens

    def withdraw(self, sequence: SequenceState) -> int:
        """Takes back what a sequence was given, if anything; returns how many tokens."""
        taken = self._taken.pop(sequence, Taken(0, 0))
        self.num_rows += taken.num_tokens
        self.num_logits += taken.num_logits
        return taken.num_tokens

    def chunks(self, running: Iterable[SequenceState]) -> list[Scheduled]:
        """Returns what was taken, in the order of the running sequences."""
        taken = self._taken
        return [Scheduled(s, taken[s].num_tokens) for s in running if s in taken]
