"""Attention over paged keys and values, registered with transformers as "linker".

Per sequence: its new keys and values are written to its pages, its history is read as a view where
its pages are one run (gathered otherwise) and goes through scaled dot-product attention. This is
the seam where a paged kernel goes in.

Legend: T rows of the batch, n rows of one sequence, H query heads, K key/value heads, G = H / K,
S history positions, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linker_core.engine.kv_cache import KVCache, PageTable

ATTENTION_NAME = "linker"


class Span(NamedTuple):
    """The rows of one sequence in a batch: positions `start` to `start + num_rows - 1`."""

    start: int
    num_rows: int
    table: PageTable


@dataclass(slots=True)
class SpanIndex:
    """What attention needs of one span, worked out once per step and used by every layer."""

    span: Span
    first_row: int
    # Where the history lies: the slot of position 0 for one run of pages, else every slot.
    run_start: int | None
    slots: torch.Tensor | None  # [S]
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by sliding window


class AttentionBatch:
    """The spans of one step over one cache.

    Args:
        spans: In the order of the rows; their pages already hold room for every position.
        cache: The family's cache.
    """

    def __init__(self, spans: Sequence[Span], cache: KVCache) -> None:
        self.cache = cache
        self.device = cache.keys_LKSD.device
        self.indices: list[SpanIndex] = []
        written: list[int] = []
        first_row = 0
        for span in spans:
            end = span.start + span.num_rows
            written.extend(cache.token_slots(span.table, span.start, end).tolist())
            self.indices.append(self._index(span, first_row, end))
            first_row += span.num_rows
        self.written_T = torch.tensor(written, dtype=torch.long, device=self.device)

    def _index(self, span: Span, first_row: int, end: int) -> SpanIndex:
        if span.table.contiguous:
            run_start = span.table.pages[0] * self.cache.shape.page_tokens
            return SpanIndex(span, first_row, run_start, None)
        slots = torch.from_numpy(self.cache.token_slots(span.table, 0, end)).to(self.device)
        return SpanIndex(span, first_row, None, slots)

    def write(self, layer: int, keys_KTD: torch.Tensor, values_KTD: torch.Tensor) -> None:
        """Stores the new keys and values of every row."""
        self.cache.keys_LKSD[layer].index_copy_(1, self.written_T, keys_KTD)
        self.cache.values_LKSD[layer].index_copy_(1, self.written_T, values_KTD)

    def history(
        self, layer: int, index: SpanIndex, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values [K, S, D] of a span's positions `first` to its last row's."""
        end = index.span.start + index.span.num_rows
        keys_KSD, values_KSD = self.cache.keys_LKSD[layer], self.cache.values_LKSD[layer]
        if index.run_start is not None:
            window = slice(index.run_start + first, index.run_start + end)
            return keys_KSD[:, window], values_KSD[:, window]
        assert index.slots is not None
        slots = index.slots[first:]
        return keys_KSD.index_select(1, slots), values_KSD.index_select(1, slots)

    def mask(self, index: SpanIndex, first: int, window: int | None) -> torch.Tensor:
        """Returns the additive mask [n, S] of a span whose history begins at position `first`."""
        found = index.masks.get(window)
        if found is None:
            found = self._build_mask(index.span, first, window)
            index.masks[window] = found
        return found

    def _build_mask(self, span: Span, first: int, window: int | None) -> torch.Tensor:
        end = span.start + span.num_rows
        query_n1 = torch.arange(span.start, end, device=self.device).unsqueeze(1)
        key_1S = torch.arange(first, end, device=self.device).unsqueeze(0)
        hidden = key_1S > query_n1
        if window is not None:
            hidden = hidden | (key_1S <= query_n1 - window)
        mask = torch.zeros(hidden.shape, dtype=self.cache.shape.dtype, device=self.device)
        return mask.masked_fill_(hidden, float("-inf"))


def paged_attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    batch: AttentionBatch,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attends every row to its own sequence's history; transformers calls it once per layer.

    Args:
        module: The attention module; only its `layer_idx` is read.
        query: [1, H, T, D].
        key: [1, K, T, D], rotated.
        value: [1, K, T, D].
        attention_mask: None; no mask function is registered under this name.
        scaling: Factor of the scores.
        batch: The step's spans and pages.
        sliding_window: How many positions a row sees, its own included; None for all.
        softcap: Gemma 2's soft cap of the scores.

    Returns:
        The rows as [1, T, H, D], and None for the weights.
    """
    assert attention_mask is None
    layer = cast("int", module.layer_idx)
    batch.write(layer, key[0], value[0])
    num_heads, num_rows, head_dim = query.shape[1:]
    out_THD = query.new_empty(num_rows, num_heads, head_dim)
    for index in batch.indices:
        span = index.span
        first = 0 if sliding_window is None else max(0, span.start - sliding_window + 1)
        keys_KSD, values_KSD = batch.history(layer, index, first)
        rows = slice(index.first_row, index.first_row + span.num_rows)
        # The query heads that share a key head become rows of one small batch per key head.
        query_KGnD = query[0, :, rows].reshape(len(keys_KSD), -1, span.num_rows, head_dim)
        mask = _mask_of(batch, index, first, sliding_window)
        if softcap is None:
            attended_KGnD = _attend(query_KGnD, keys_KSD, values_KSD, mask, scaling)
        else:
            attended_KGnD = _attend_capped(
                query_KGnD, keys_KSD, values_KSD, mask, scaling=scaling, softcap=softcap
            )
        out_THD[rows] = attended_KGnD.flatten(0, 1).transpose(0, 1)
    return out_THD.unsqueeze(0), None


def _mask_of(
    batch: AttentionBatch, index: SpanIndex, first: int, window: int | None
) -> torch.Tensor | None:
    # A single row sees its whole history: the window has already cut it.
    return None if index.span.num_rows == 1 else batch.mask(index, first, window)


def _attend(
    query_KGnD: torch.Tensor,
    keys_KSD: torch.Tensor,
    values_KSD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    if mask is None:
        # [1, K, G, D]: a decode's query group as the rows, so that its keys are read once.
        return F.scaled_dot_product_attention(
            query_KGnD.squeeze(2).unsqueeze(0),
            keys_KSD.unsqueeze(0),
            values_KSD.unsqueeze(0),
            scale=scaling,
        )[0].unsqueeze(2)
    group = query_KGnD.shape[1]
    return F.scaled_dot_product_attention(
        query_KGnD,
        keys_KSD.unsqueeze(1).expand(-1, group, -1, -1),
        values_KSD.unsqueeze(1).expand(-1, group, -1, -1),
        attn_mask=mask,
        scale=scaling,
    )


def _attend_capped(
    query_KGnD: torch.Tensor,
    keys_KSD: torch.Tensor,
    values_KSD: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with soft-capped scores in float32, which no fused kernel on the CPU offers."""
    keys_K1DS = keys_KSD.unsqueeze(1).transpose(2, 3)
    scores_KGnS = torch.matmul(query_KGnD, keys_K1DS).float() * scaling
    scores_KGnS = torch.tanh(scores_KGnS / softcap) * softcap
    if mask is not None:
        scores_KGnS = scores_KGnS + mask
    weights_KGnS = torch.softmax(scores_KGnS, dim=-1).to(query_KGnD.dtype)
    return torch.matmul(weights_KGnS, values_KSD.unsqueeze(1))


def register_attention() -> None:
    """Makes "linker" known to transformers; calling it again changes nothing.

    No mask function goes with it: an unknown name makes transformers skip its masks, which this
    function does not need.
    """
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
