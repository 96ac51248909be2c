"""Turns grammars into matchers on a thread of its own, so that no step waits for one.

llguidance gives the interpreter free while it compiles.
"""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import llguidance

from linker_core.engine import grammar_trial
from linker_core.engine.grammar import Matcher, uncompilable
from linker_core.engine.grammar_tokenizers import GrammarTokenizer, GrammarTokenizers
from linker_core.engine.sequence import SequenceState
from linker_core.errors import LinkerError

MAX_GRAMMAR_BYTES = 64 << 10
_REMEMBERED_TRIALS = 256  # 16 MiB of grammars at the most


class GrammarBuilds:
    """Sequences that wait for their matchers."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[SequenceState, Future[Matcher]] = {}
        # Touched by the thread alone.
        self._tokenizers = GrammarTokenizers()
        self._ends = functools.lru_cache(_REMEMBERED_TRIALS)(grammar_trial.ends)

    @property
    def num_pending(self) -> int:
        """How many sequences wait."""
        return len(self._pending)

    def start(self, sequence: SequenceState, directory: Path) -> None:
        """Begins to build the matcher of a sequence.

        Args:
            sequence: Has a grammar.
            directory: Of its model's checkpoint, whose tokenizer is read.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._pending[sequence] = self._executor.submit(self._build, sequence, directory)

    def cancel(self, sequence: SequenceState) -> bool:
        """Forgets a sequence; False if it does not wait here."""
        future = self._pending.pop(sequence, None)
        if future is None:
            return False
        future.cancel()
        return True

    def finished(self, timeout_s: float) -> list[tuple[SequenceState, Matcher | LinkerError]]:
        """Returns the sequences whose matchers are ready, or cannot be made.

        Args:
            timeout_s: How long to wait for the first of them.
        """
        if not self._pending:
            return []
        # One thread makes them in their order, so none is ready before the first.
        wait(itertools.islice(self._pending.values(), 1), timeout_s)
        made = itertools.takewhile(lambda entry: entry[1].done(), self._pending.items())
        return [(sequence, _outcome(self._pending.pop(sequence))) for sequence, _ in list(made)]

    def forget_model(self, slot: int) -> None:
        """Drops what is kept of a model that has gone."""
        if self._executor is not None:
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
    inner = llguidance.LLMatcher(tokenizer.inner, grammar, log_level=0, limits=limits)
    if inner.is_error():
        raise uncompilable(inner.get_error())
    return Matcher(
        inner,
        tokenizer.inner,
        end_ids=tokenizer.end_ids,
        stop_ids=sequence.sampling.stop_token_ids,
        width=sequence.vocab_size,
    )


def _outcome(future: Future[Matcher]) -> Matcher | LinkerError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, LinkerError):
        return error
    return uncompilable(f"{type(error).__name__}: {error}")
