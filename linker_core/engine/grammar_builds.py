"""Turns grammars into matchers on a thread of its own, so that no step waits for one.

llguidance gives the interpreter free while it compiles.
"""

from __future__ import annotations

import functools
import logging
from concurrent.futures import Future, wait
from pathlib import Path
from typing import NamedTuple

from linker_core.engine import grammar_trial
from linker_core.engine.grammar import Matcher, uncompilable
from linker_core.engine.grammar_tokenizers import GrammarTokenizer, GrammarTokenizers
from linker_core.engine.sequence import SequenceState
from linker_core.errors import EngineFailureError, LinkerError, QueueFullError
from linker_core.started_threads import started_threads

_log = logging.getLogger(__name__)

MAX_GRAMMAR_BYTES = 64 << 10
MAX_WAITING = 32  # sequences of one model; each may take a trial's seconds
_REMEMBERED_TRIALS = 256  # 16 MiB of grammars at the most


class _Building(NamedTuple):
    sequence: SequenceState
    future: Future[Matcher]


class GrammarBuilds:
    """Sequences that wait for their matchers; their models take turns."""

    def __init__(self) -> None:
        self._executor = started_threads(1, "grammar")  # else a shortage would end the engine
        # By slot, whose turn comes next first; each with its sequences in their order.
        self._waiting: dict[int, dict[SequenceState, Path]] = {}
        self._building: _Building | None = None
        self._is_cancelled = False  # what is being built
        # Touched by the thread alone.
        self._tokenizers = GrammarTokenizers()
        self._ends = functools.lru_cache(_REMEMBERED_TRIALS)(grammar_trial.ends)

    @property
    def num_pending(self) -> int:
        """How many sequences wait."""
        is_building = self._building is not None and not self._is_cancelled
        return sum(map(len, self._waiting.values())) + is_building

    def start(self, sequence: SequenceState, directory: Path) -> None:
        """Begins to build the matcher of a sequence, as soon as it is its model's turn.

        Args:
            sequence: Has a grammar.
            directory: Of its model's checkpoint, whose tokenizer is read.

        Raises:
            QueueFullError: Too many sequences of this model wait already.
        """
        waiting = self._waiting.setdefault(sequence.slot, {})
        if len(waiting) >= MAX_WAITING:
            raise QueueFullError(
                f"{len(waiting)} requests for structured output of model '{sequence.model}' wait "
                "to have their grammars compiled. Try again in a moment."
            )
        waiting[sequence] = directory
        self._build_next()

    def cancel(self, sequence: SequenceState) -> bool:
        """Forgets a sequence; False if it does not wait here."""
        if self._building is not None and self._building.sequence is sequence:
            self._is_cancelled = True  # it has begun, and is not waited for
            return True
        waiting = self._waiting.get(sequence.slot, {})
        if waiting.pop(sequence, None) is None:
            return False
        if not waiting:
            del self._waiting[sequence.slot]
        return True

    def finished(self, timeout_s: float) -> list[tuple[SequenceState, Matcher | LinkerError]]:
        """Returns the sequences whose matchers are ready, or cannot be made.

        Args:
            timeout_s: How long to wait for the first of them.
        """
        if self._building is None:
            return []
        sequence, future = self._building
        if not wait([future], timeout_s).done:
            return []
        made = [] if self._is_cancelled else [(sequence, _outcome(future, sequence))]
        self._building = None
        self._build_next()
        return made

    def close(self) -> None:
        """Forgets all sequences. What is being built is left to its end, a few seconds at most."""
        self._waiting.clear()
        self._is_cancelled = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _build_next(self) -> None:
        if self._building is not None or not self._waiting:
            return
        slot = next(iter(self._waiting))
        waiting = self._waiting.pop(slot)
        sequence = next(iter(waiting))
        directory = waiting.pop(sequence)
        if waiting:
            self._waiting[slot] = waiting  # behind the others
        self._is_cancelled = False
        self._building = _Building(
            sequence, self._executor.submit(self._build, sequence, directory)
        )

    def forget_model(self, slot: int) -> None:
        """Drops what is kept of a model that has gone."""
        self._executor.submit(self._tokenizers.forget, slot)

    def _build(self, sequence: SequenceState, directory: Path) -> Matcher:
        tokenizer = self._tokenizers.get(sequence.slot, sequence.model, directory)
        assert sequence.sampling.grammar is not None
        if not self._ends(sequence.sampling.grammar):
            raise uncompilable(f"it takes more than {grammar_trial.MAX_CPU_S} s or too much memory")
        return compile_grammar(sequence, tokenizer)


def compile_grammar(sequence: SequenceState, tokenizer: GrammarTokenizer) -> Matcher:
    """Returns the matcher of a sequence that has a grammar.

    Raises:
        InvalidRequestError: The grammar is none, or too complex.
    """
    grammar = sequence.sampling.grammar
    assert grammar is not None
    limits = grammar_trial.limits()
    import llguidance  # noqa: PLC0415 - with the first grammar

    try:
        inner = llguidance.LLMatcher(tokenizer.inner, grammar, log_level=0, limits=limits)
    except ValueError as error:  # it is no text
        raise uncompilable(str(error)) from error
    if inner.is_error():
        raise uncompilable(inner.get_error())
    return Matcher(
        inner,
        tokenizer.inner,
        end_ids=tokenizer.end_ids,
        stop_ids=sequence.sampling.stop_token_ids,
        width=sequence.vocab_size,
    )


def _outcome(future: Future[Matcher], sequence: SequenceState) -> Matcher | LinkerError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, LinkerError):
        return error
    _log.error("no matcher was made for request %s", sequence.request_id, exc_info=error)
    return EngineFailureError(
        "The grammar could not be compiled, through no fault of its own. Send the request again, "
        "and tell the operator if it fails again."
    )
