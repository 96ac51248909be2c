"""Models' tokenizers as llguidance wants them: one for all models that have the same.

Used by one thread. While a tokenizer is prepared llguidance holds the interpreter, about a second
for 150,000 tokens; a family's fine-tunes seldom change theirs, so this happens once per family.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from linker_core.engine.grammar import GRAMMAR_PARAM
from linker_core.errors import InvalidRequestError, LinkerError
from linker_core.sharing.delta import open_weights
from linker_core.text.files import MAX_FILE_BYTES, TOKENIZER_FILE
from linker_core.weights.files import read_optional

if TYPE_CHECKING:
    import llguidance


class GrammarTokenizer(NamedTuple):
    """What grammars of one model are compiled for."""

    inner: llguidance.LLTokenizer
    end_ids: tuple[int, ...]  # the model's own


class _Entry(NamedTuple):
    digest: bytes  # of the file
    tokenizer: GrammarTokenizer | LinkerError


class GrammarTokenizers:
    """Prepares tokenizers when they are first needed, and keeps them while a model uses them."""

    def __init__(self) -> None:
        self._by_slot: dict[int, _Entry] = {}

    def get(self, slot: int, model: str, directory: Path) -> GrammarTokenizer:
        """Returns the tokenizer of the model in a slot.

        Args:
            slot: Never used again by another model.
            model: Its name.
            directory: Of its checkpoint or delta.

        Raises:
            InvalidRequestError: It has none, or none that can be used for this.
        """
        entry = self._by_slot.get(slot)
        if entry is None:
            entry = self._by_slot[slot] = self._prepare(model, directory)
        if isinstance(entry.tokenizer, LinkerError):
            # Without the frames of those who asked before, which it would keep for ever.
            raise entry.tokenizer.with_traceback(None)
        return entry.tokenizer

    def forget(self, slot: int) -> None:
        """Drops what is kept of a model that has gone."""
        self._by_slot.pop(slot, None)

    def _prepare(self, model: str, directory: Path) -> _Entry:
        digest = b""
        try:
            with open_weights(directory) as weights:
                end_ids = tuple(sorted(weights.eos_token_ids))
            data = read_optional(directory, TOKENIZER_FILE, max_bytes=MAX_FILE_BYTES) or b""
            digest = hashlib.sha256(data).digest()
            inner = self._shared(digest) or _load(data.decode(), end_ids)
            return _Entry(digest, GrammarTokenizer(inner, end_ids))
        except (LinkerError, ValueError) as error:
            return _Entry(digest, _unusable(model, str(error)))

    def _shared(self, digest: bytes) -> llguidance.LLTokenizer | None:
        for entry in self._by_slot.values():
            if entry.digest == digest and isinstance(entry.tokenizer, GrammarTokenizer):
                return entry.tokenizer.inner
        return None


def _load(text: str, end_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
    import llguidance  # noqa: PLC0415 - with the first grammar

    text = text.strip()
    if not text.startswith("{"):  # what does not would be taken for the name of a file
        raise ValueError(f"{TOKENIZER_FILE} holds no JSON object")
    try:
        return llguidance.LLTokenizer(text, eos_token=list(end_ids) or None)
    except ValueError:
        # An end token beyond the tokenizer's own tokens; any will do, since it is hidden anyway.
        return llguidance.LLTokenizer(text)


def _unusable(model: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The tokenizer of model '{model}' cannot be used for structured output: "
        f"{reason.partition(chr(10))[0][:200]}. Ask for plain text.",
        param=GRAMMAR_PARAM,
    )
