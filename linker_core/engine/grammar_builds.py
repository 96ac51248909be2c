"""Turns grammars into matchers on a thread of its own, so that no step waits for one.

llguidance gives the interpreter free while it builds. A tokenizer is prepared once per model, when
the model's first grammar comes (about a second for 150,000 tokens), and dropped with the model.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import llguidance

from linker_core.engine.grammar import GRAMMAR_PARAM, Matcher, uncompilable
from linker_core.engine.sequence import SequenceState
from linker_core.errors import InvalidRequestError, LinkerError
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.checkpoint import Checkpoint

MAX_GRAMMAR_BYTES = 64 << 10
# Of one matcher; about 60 MB. llguidance's own bound would be ten times as much.
_MAX_LEXER_STATES = 30_000
_MAX_GRAMMAR_SYMBOLS = 100_000


class GrammarBuilds:
    """Sequences that wait for their matchers."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[SequenceState, Future[Matcher]] = {}
        # By slot. Written by the thread, dropped by the engine when the slot's model has gone.
        self._tokenizers: dict[int, llguidance.LLTokenizer | LinkerError] = {}

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
        wait(self._pending.values(), timeout_s, FIRST_COMPLETED)
        ready = [sequence for sequence, future in self._pending.items() if future.done()]
        return [(sequence, _outcome(self._pending.pop(sequence))) for sequence in ready]

    def forget_model(self, slot: int) -> None:
        """Drops what is kept of a model that has gone."""
        self._tokenizers.pop(slot, None)

    def _build(self, sequence: SequenceState, directory: Path) -> Matcher:
        tokenizer = self._tokenizers.get(sequence.slot)
        if tokenizer is None:
            tokenizer = self._tokenizers[sequence.slot] = _prepare(sequence.model, directory)
        if isinstance(tokenizer, LinkerError):
            raise tokenizer
        return compile_grammar(sequence, tokenizer)


def compile_grammar(sequence: SequenceState, tokenizer: llguidance.LLTokenizer) -> Matcher:
    """Returns the matcher of a sequence that has a grammar.

    Raises:
        InvalidRequestError: The grammar is none, or too complex.
    """
    grammar = sequence.sampling.grammar
    assert grammar is not None
    # What its other limits leave open is work: about 20 ms for a mask, 60 ms to begin with.
    limits = llguidance.LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES,
        max_grammar_size=_MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,  # they would hold the answer so far
    )
    inner = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if inner.is_error():
        raise uncompilable(inner.get_error())
    return Matcher(
        inner,
        tokenizer,
        stop_ids=sequence.sampling.stop_token_ids,
        width=sequence.vocab_size,
    )


def _prepare(model: str, directory: Path) -> llguidance.LLTokenizer | LinkerError:
    """Returns the model's tokenizer as llguidance wants it, or why there is none."""
    try:
        with Checkpoint.open(directory) as checkpoint:
            end_ids = sorted(checkpoint.eos_token_ids)
        tokenizer = Tokenizer.load(directory)
        end_ids = [token for token in end_ids if token < tokenizer.num_tokens]
        return llguidance.LLTokenizer(tokenizer.to_json(), eos_token=end_ids or None)
    except (LinkerError, ValueError) as error:
        return InvalidRequestError(
            f"The tokenizer of model '{model}' cannot be used for structured output: "
            f"{str(error)[:200]}. Ask for plain text.",
            param=GRAMMAR_PARAM,
        )


def _outcome(future: Future[Matcher]) -> Matcher | LinkerError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, LinkerError):
        return error
    return uncompilable(f"{type(error).__name__}: {error}")
