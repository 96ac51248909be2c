"""Sampling as the engine sees it: rows in, tokens out, and every fault kept to its own row."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from linker_core.engine.grammar import GrammarMasks, Matcher
from linker_core.engine.sampling.choose import Result, Sampled, choose
from linker_core.engine.sampling.row_state import RowState
from linker_core.engine.sequence import SequenceState
from linker_core.errors import EngineFailureError, LinkerError

_log = logging.getLogger(__name__)


class Sampler:
    """Chooses tokens; keeps what it needs of a sequence from its first token to its last."""

    def __init__(self) -> None:
        self._states: dict[SequenceState, RowState] = {}
        self._masks = GrammarMasks()

    def constrain(self, sequence: SequenceState, matcher: Matcher) -> None:
        """Lets a new sequence follow a grammar."""
        self._states[sequence] = RowState(sequence, matcher)

    def forget(self, sequence: SequenceState) -> None:
        """Drops what is kept of a sequence that has ended."""
        self._states.pop(sequence, None)

    @torch.inference_mode()
    def sample(self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> list[Result]:
        """Chooses one token per row.

        Args:
            logits_RV: Raw logits; a row is valid up to its variant's own width and finite beyond.
            sequences: The sequence of each row.

        Returns:
            Per row the token, or the error that ends this sequence alone.
        """
        try:
            results = self._choose(logits_RV, sequences)
        except Exception:  # noqa: BLE001 - one request must not end the others of its batch
            _log.exception("sampling a batch failed; its rows are sampled one by one")
            results = [
                self._choose_alone(logits_RV[row : row + 1, : sequence.vocab_size], sequence)
                for row, sequence in enumerate(sequences)
            ]
        return [self._followed(*pair) for pair in zip(results, sequences, strict=True)]

    def _choose(self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> list[Result]:
        return choose(logits_RV, [self._state(sequence) for sequence in sequences], self._masks)

    def _choose_alone(self, logits_1V: torch.Tensor, sequence: SequenceState) -> Result:
        try:
            return self._choose(logits_1V, [sequence])[0]
        except Exception:  # noqa: BLE001 - its fault ends it alone
            _log.exception("sampling failed for request %s", sequence.request_id)
            return EngineFailureError("The next token could not be chosen. See the server's log.")

    def _state(self, sequence: SequenceState) -> RowState:
        state = self._states.get(sequence)
        if state is None:
            state = self._states[sequence] = RowState(sequence)
        return state

    def _followed(self, result: Result, sequence: SequenceState) -> Result:
        """Moves the row's matcher on, if it has one."""
        if not isinstance(result, Sampled):
            return result
        matcher = self._states[sequence].matcher
        if matcher is None:
            return result
        try:
            return result._replace(ends_answer=matcher.take(result.token_id))
        except LinkerError as error:
            return error
