"""One family's model and its forward pass over a ragged batch of all variants.

The skeleton is the Hugging Face model with routed leaves; a step is one call of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from linker_core.engine.attention import AttentionBatch, Span
from linker_core.engine.kv_cache import KVCache, PageTable
from linker_core.engine.leaf import RoutedLeaf
from linker_core.engine.routing import route_model
from linker_core.engine.rows import RowMap, StepContext
from linker_core.residency.ledger import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence that one step computes."""

    slot: int
    token_ids: Sequence[int]  # positions start to start + len - 1
    start: int
    table: PageTable  # holds room for every position of the chunk
    wants_token: bool  # whether the logits after its last token are needed


class Runner:
    """Runs one family.

    Args:
        skeleton: The family's model, built with `attn_implementation` "linker"; its leaves are
            replaced.
        cache: The family's KV cache; its dtype is the dtype of the activations.
        device: Where everything lies.
    """

    def __init__(self, skeleton: PreTrainedModel, cache: KVCache, *, device: torch.device) -> None:
        self.model = skeleton
        self.cache = cache
        self.context = StepContext()
        self._device = device
        self._leaves = route_model(skeleton, self.context, dtype=cache.shape.dtype)

    def bind(self, slot: int, tensors: Mapping[str, Stored]) -> None:
        """Lets rows of `slot` be served by `tensors`, named as in the checkpoint.

        Raises:
            KeyError: A leaf has no tensor; no leaf knows the slot then.
        """
        bound: list[RoutedLeaf] = []
        try:
            for leaf in self._leaves:
                leaf.bind(slot, tensors)
                bound.append(leaf)
        except BaseException:
            for leaf in bound:
                leaf.unbind(slot)
            raise

    def unbind(self, slot: int) -> None:
        """Forgets `slot` and every storage that no other slot uses."""
        for leaf in self._leaves:
            leaf.unbind(slot)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Computes the chunks as one ragged batch and writes their keys and values.

        Args:
            chunks: One per sequence, not empty. Chunks of one slot are best kept together.

        Returns:
            Logits [R, V] in the dtype of the activations, one row for each chunk that wants a
            token, in their order; V is the widest vocabulary among them. Empty if none does.
        """
        slots = [chunk.slot for chunk in chunks for _ in chunk.token_ids]
        ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.token_ids))]
        spans = [Span(chunk.start, len(chunk.token_ids), chunk.table) for chunk in chunks]
        body = RowMap(slots, device=self._device)
        wanted = _last_rows(chunks)
        self.context.body = body
        # A head over no rows has no groups; it is skipped by asking for the body alone.
        self.context.head = (
            RowMap([slots[row] for row in wanted], device=self._device) if wanted else None
        )
        inputs = {
            "input_ids": self._row_tensor(ids),
            "position_ids": self._row_tensor(positions),
            "use_cache": False,
            "batch": AttentionBatch(spans, self.cache),
        }
        if not wanted:
            self.model.base_model(**inputs)
            return torch.empty(0, 0, device=self._device)
        keep = torch.tensor(wanted, dtype=torch.long, device=self._device)
        logits: torch.Tensor = self.model(**inputs, logits_to_keep=keep).logits
        return logits[0]

    def _row_tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.long, device=self._device)


def _last_rows(chunks: Sequence[Chunk]) -> list[int]:
    """Returns the row of the last token of every chunk that wants one."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += len(chunk.token_ids)
        if chunk.wants_token:
            rows.append(end - 1)
    return rows
