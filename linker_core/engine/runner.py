"""One family's forward pass over a ragged batch of all its variants.

Legend: T rows of the batch, R rows that want logits, V widest vocabulary among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from linker_core.engine.arithmetic import Arithmetic, Span
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.leaf import RoutedLeaf
from linker_core.engine.page_table import PageTable
from linker_core.engine.routed_model import RoutedModel
from linker_core.engine.rows import RowMap, StepContext, partition
from linker_core.engine.uploads import upload
from linker_core.residency.stored import Stored
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.keys import EMBED_NAME, FINAL_NORM_NAME, LM_HEAD_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence that one step computes."""

    slot: int
    token_ids: Sequence[int]  # positions start to start + len - 1
    start: int
    table: PageTable  # holds room for every position of the chunk
    num_logits: int  # how many of its last rows want logits, 0 to len(token_ids)


class StepResult(NamedTuple):
    """What a step gave."""

    logits_RV: torch.Tensor  # a row is valid up to its own variant's width and zero beyond
    finite: list[bool]  # of each chunk: whether all its last hidden states are


class Runner:
    """Runs one family.

    Args:
        config: The family's shape.
        cache: The family's KV cache; its dtype is the dtype of the activations.
        arithmetic: Computes what the blocks ask for.
        device: Where everything lies.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        arithmetic: Arithmetic,
        *,
        device: torch.device,
    ) -> None:
        self.cache = cache
        self.context = StepContext(arithmetic)
        self.model = RoutedModel(config, self.context, device=device, dtype=cache.shape.dtype)
        self._device = device
        # Of each slot: slots of one kind have the same storages in every block.
        self._kinds: dict[int, int] = {}

    def warming_up(self, tensors: Mapping[str, Stored]) -> Callable[[], None]:
        """Returns what makes ready all that steps over `tensors` need, before they are bound.

        It may be called on any thread, and keeps neither them nor the cache: who has it done beside
        the steps may give both up before it ends.

        Raises:
            KeyError: A leaf has no tensor.
        """
        demand = self.model.demand(tensors, page_tokens=self.cache.shape.page_tokens)
        return partial(self.context.arithmetic.warm_up, demand)

    def bind(self, slot: int, tensors: Mapping[str, Stored]) -> None:
        """Lets rows of `slot` be served by `tensors`, named as in the checkpoint.

        Raises:
            KeyError: A leaf has no tensor; no leaf knows the slot then.
        """
        self.context.arithmetic.forget()
        bound: list[RoutedLeaf] = []
        try:
            for leaf in self.model.leaves:
                leaf.bind(slot, tensors)
                bound.append(leaf)
        except BaseException:
            for leaf in bound:
                leaf.unbind(slot)
            raise
        self._sort()

    def unbind(self, slot: int) -> None:
        """Forgets `slot` and every storage that no other slot uses."""
        for leaf in self.model.leaves:
            leaf.unbind(slot)
        self._sort()
        self.context.arithmetic.forget()

    def _sort(self) -> None:
        """Numbers the kinds of slots anew."""
        outside = (EMBED_NAME, FINAL_NORM_NAME, LM_HEAD_NAME)
        leaves = [leaf for leaf in self.model.leaves if f"{leaf.leaf_name}.weight" not in outside]
        slots = self.model.slots
        labels, _ = partition(
            tuple(stored for leaf in leaves for stored in leaf.kind(slot)) for slot in slots
        )
        self._kinds = dict(zip(slots, labels, strict=True))

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> StepResult:
        """Computes the chunks as one ragged batch and writes their keys and values.

        Args:
            chunks: One per sequence, not empty. Chunks of one slot are best kept together.

        Returns:
            Logits in the dtype of the activations: for each chunk, in their order, its last
            `num_logits` rows. Empty if none wants any.
        """
        slots = [chunk.slot for chunk in chunks for _ in chunk.token_ids]
        ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [p for c in chunks for p in range(c.start, c.start + len(c.token_ids))]
        self.context.body = RowMap(slots, device=self._device)
        arithmetic = self.context.arithmetic
        spans = [Span(chunk.start, len(chunk.token_ids), chunk.table) for chunk in chunks]
        batch = arithmetic.prepare(spans, self.cache)
        rotation = self.model.rotation(self._on_device(positions), max(positions) + 1)
        embedded_TH = self.model.embed(self._on_device(ids))
        num_rows, hidden = embedded_TH.shape
        x_TH = arithmetic.buffer("x", num_rows, hidden, embedded_TH).copy_(embedded_TH)

        def run_blocks() -> None:
            for layer in range(self.model.config.num_layers):
                self.model.block(layer, x_TH, rotation=rotation, batch=batch)

        # Steps that only decode come again; their attention differs by what `prepare` says.
        decodes = len(chunks) == len(slots)
        key = tuple(self._kinds[slot] for slot in slots) if decodes else None
        arithmetic.run(key, run_blocks)
        x_TH = self.model.final_norm(x_TH)
        return StepResult(self._logits(x_TH, chunks, slots), _finite(x_TH, chunks))

    def _logits(
        self, x_TH: torch.Tensor, chunks: Sequence[Chunk], slots: Sequence[int]
    ) -> torch.Tensor:
        wanted = _wanted_rows(chunks)
        if not wanted:
            return x_TH.new_empty(0, 0)
        self.context.head = RowMap([slots[row] for row in wanted], device=self._device)
        if len(wanted) < len(x_TH):
            x_TH = x_TH.index_select(0, self._on_device(wanted))
        return self.model.logits(x_TH)

    def _on_device(self, values: Sequence[int]) -> torch.Tensor:
        return upload(np.array(values, np.int64), self._device)


def _wanted_rows(chunks: Sequence[Chunk]) -> list[int]:
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += len(chunk.token_ids)
        rows.extend(range(end - chunk.num_logits, end))
    return rows


def _finite(x_TH: torch.Tensor, chunks: Sequence[Chunk]) -> list[bool]:
    """Says of each chunk whether its rows are free of NaN and infinities."""
    # A sum over a row is finite only if all its elements are; it overflows for none that is sane.
    of_row = torch.isfinite(x_TH.sum(dim=1, dtype=torch.float32)).tolist()
    if all(of_row):
        return [True] * len(chunks)
    finite: list[bool] = []
    end = 0
    for chunk in chunks:
        first, end = end, end + len(chunk.token_ids)
        finite.append(all(of_row[first:end]))
    return finite
