"""Many plans in one walk: what computes the same is computed once, each block is read once.

Knows nothing of what is measured at the end. Legend: T tokens of all sequences, R rows of interest,
n rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from linker_core.tuning.memory import LOGITS_CHUNK_BYTES
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.walk import Walk


@dataclass(slots=True)
class _State:
    """Hidden states that some plans have in common so far."""

    plans: list[int]
    states: torch.Tensor  # [T, H]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastHidden:
    """What the blocks made of the rows of interest under one plan."""

    rungs: Rungs
    hidden: torch.Tensor  # [R, H]


class SharedWalk:
    """Takes sequences through all blocks under many plans.

    Args:
        walk: Over the sequences.
        reader: Of the pair.
        token_ids: All sequences, one after the other.
        rows: Those whose next-token distributions are of interest.
    """

    def __init__(
        self, walk: Walk, reader: SectionReader, token_ids: Sequence[int], rows: Sequence[int]
    ) -> None:
        self._walk = walk
        self._reader = reader
        self._token_ids = token_ids
        self._rows = torch.tensor(rows, device=walk.device)
        self.block_passes = 0  # blocks computed over all sequences

    @property
    def forward_passes(self) -> float:
        """Passes of the whole variant that the walks so far amount to."""
        return self.block_passes / self._walk.config.num_layers

    @torch.inference_mode()
    def last_hidden(self, plans: Sequence[Rungs]) -> list[LastHidden]:
        """Returns what follows from each plan; plans share what they compute until they part."""
        states = self._embedded(plans)
        for layer in range(self._walk.config.num_layers):
            parents: list[torch.Tensor] = []
            children: list[list[int]] = []
            for state in states:
                for members in _grouped(state.plans, plans, self._reader, layer):
                    parents.append(state.states)
                    children.append(members)
            storages = [self._reader.storages(layer, plans[members[0]]) for members in children]
            hidden = self._walk.block(layer, storages, parents)
            self.block_passes += len(children)
            states = [_State(*pair) for pair in zip(children, hidden, strict=True)]
            self._reader.forget(layer)
        last: dict[int, torch.Tensor] = {}
        while states:  # each goes as soon as it has been read
            state = states.pop()
            rows = state.states.index_select(0, self._rows)
            last |= dict.fromkeys(state.plans, rows)
        return [LastHidden(rungs=rungs, hidden=last[i]) for i, rungs in enumerate(plans)]

    def chunks(self) -> list[slice]:
        """Returns the rows of interest in parts whose logits fit into one chunk."""
        length = max(1, LOGITS_CHUNK_BYTES // (4 * self._walk.config.vocab_size))
        return [slice(i, i + length) for i in range(0, len(self._rows), length)]

    @torch.inference_mode()
    def logits(self, last: LastHidden, rows: slice) -> torch.Tensor:
        """Returns float32 logits [n, V] of the next token; `forget` when all are read."""
        logits_nV = self._walk.logits(self._reader.storages(None, last.rungs), last.hidden[rows])
        return logits_nV[:, : self._walk.config.vocab_size]

    def log_probs(self, last: LastHidden, rows: slice) -> torch.Tensor:
        """Returns log-probabilities [n, V] of the next token; `forget` when all are read."""
        return torch.log_softmax(self.logits(last, rows), dim=-1)

    def forget(self) -> None:
        """Lets go of embeddings and heads."""
        self._reader.forget(None)

    def _embedded(self, plans: Sequence[Rungs]) -> list[_State]:
        """Returns the first states; embeddings and heads stay held for the logits to come."""
        return [
            _State(
                members,
                self._walk.embed(self._reader.storages(None, plans[members[0]]), self._token_ids),
            )
            for members in _grouped(list(range(len(plans))), plans, self._reader, None)
        ]


def _grouped(
    members: list[int], plans: Sequence[Rungs], reader: SectionReader, layer: int | None
) -> list[list[int]]:
    """Parts plans by what they compute in a section."""

    def signature(plan: int) -> tuple[str, ...]:
        return reader.signature(layer, plans[plan])

    return [list(group) for _, group in groupby(sorted(members, key=signature), key=signature)]
