"""What is reported of a prompt, computed with its first choice and given to the others, too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from linker_core.engine.messages import PromptLogprob
from server.gateway.generation import Delta


class SharedPrompts:
    """Completes the first piece of every choice by its prompt's record.

    Args:
        num_choices: Of every prompt; choices are prompt-major.
    """

    def __init__(self, num_choices: int) -> None:
        self._num_choices = num_choices
        self._records: dict[int, Iterable[PromptLogprob]] = {}  # by prompt
        self._held: dict[int, list[Delta]] = defaultdict(list)
        self._completed: set[int] = set()

    def take(self, deltas: Iterable[Delta]) -> list[Delta]:
        """Returns the pieces that can be passed on with these.

        Pieces of the other choices are held back until the record is there.
        """
        return [ready for delta in deltas for ready in self._take(delta)]

    def _take(self, delta: Delta) -> list[Delta]:
        prompt, choice = divmod(delta.index, self._num_choices)
        if choice > 0:
            if prompt in self._records:
                return [self._complete(delta)]
            self._held[prompt].append(delta)
            return []
        if delta.token.prompt_logprobs is None:
            return [delta]
        self._records[prompt] = delta.token.prompt_logprobs
        return [delta, *map(self._complete, self._held.pop(prompt, []))]

    def _complete(self, delta: Delta) -> Delta:
        if delta.index in self._completed:
            return delta
        self._completed.add(delta.index)
        record = self._records[delta.index // self._num_choices]
        return delta._replace(token=delta.token._replace(prompt_logprobs=record))
