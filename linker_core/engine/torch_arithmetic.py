"""What a block computes, in torch's own operations: for devices without kernels, and to test those.

Legend: T rows of the batch, n rows of a group, I input features, O output features, H query heads,
K key/value heads, D head size, X = (H + 2 K) D, S positions of a history, P tokens of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from linker_core.engine.arithmetic import (
    Addend,
    AttentionShape,
    ByRow,
    Demand,
    Norm,
    Product,
    Rotation,
    Span,
)
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.rows import RowGroup

_DELTA_ROWS = 4096  # of a delta that are in memory at a time


class TorchArithmetic:
    """In torch's operations, on any device; activations have the dtype of their input."""

    def warm_up(self, demand: Demand) -> None:
        """See `Arithmetic.warm_up`."""

    def buffer(self, name: str, num_rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """See `Arithmetic.buffer`."""
        del name
        return like.new_empty(num_rows, width)

    def run(self, key: Hashable | None, body: Callable[[], None]) -> None:
        """See `Arithmetic.run`."""
        del key
        body()

    def forget(self) -> None:
        """See `Arithmetic.forget`."""

    def add(self, x_TH: torch.Tensor, y_TH: torch.Tensor) -> None:
        """See `Arithmetic.add`."""
        x_TH.add_(y_TH)

    def multiply(self, x_TI: torch.Tensor, rows: RowGroup, products: Sequence[Product]) -> None:
        """See `Arithmetic.multiply`."""
        x_nI = rows.take(x_TI)
        for weight_OI, y_TO, bias in products:
            y_nO = F.linear(x_nI, weight_OI.to(x_TI.dtype))
            if bias is not None:
                y_nO += bias.gathered(rows, x_TI.dtype)
            rows.put(y_TO, y_nO)

    def add_residuals(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        """See `Arithmetic.add_residuals`."""
        for residual, rows, y_TO in addends:
            x_nI = rows.take(x_TI)
            for first in range(0, y_TO.shape[1], _DELTA_ROWS):
                part = slice(first, min(first + _DELTA_ROWS, y_TO.shape[1]))
                delta_OI = residual.delta(part).to(x_TI.dtype)
                y_TO[:, part].index_add_(0, rows.indices_n, F.linear(x_nI, delta_OI))

    def normalize(
        self, x_TX: torch.Tensor, weights: ByRow, norm: Norm, out_TX: torch.Tensor
    ) -> None:
        """See `Arithmetic.normalize`."""
        rows = RowGroup(torch.arange(len(x_TX), device=x_TX.device), slice(0, len(x_TX)))
        w_TW = weights.gathered(rows, torch.float32)
        x_TNW = x_TX.float().view(len(x_TX), -1, w_TW.shape[-1])
        scale = torch.rsqrt(x_TNW.square().mean(-1, keepdim=True) + norm.eps)
        factor_T1W = (w_TW + 1.0 if norm.plus_one else w_TW).unsqueeze(1)
        out_TX.copy_((x_TNW * scale * factor_T1W).flatten(-2))

    def gate(self, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str) -> None:
        """See `Arithmetic.gate`."""
        torch.mul(ACT2FN[activation](gate_TI), up_TI, out=gate_TI)

    def prepare(self, spans: Sequence[Span], cache: KVCache) -> _PagedBatch:
        """See `Arithmetic.prepare`."""
        return _PagedBatch(spans, cache)

    def attend(
        self,
        qkv_TX: torch.Tensor,
        rotation: Rotation,
        batch: _PagedBatch,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> torch.Tensor:
        """See `Arithmetic.attend`."""
        num_rotated = shape.num_heads + shape.num_kv_heads
        heads_THD = qkv_TX.view(len(qkv_TX), -1, shape.head_dim)
        rotated_THD = _rotated(heads_THD[:, :num_rotated], rotation)
        query_THD, key_TKD = rotated_THD.tensor_split([shape.num_heads], dim=1)
        batch.write(layer, key_TKD, heads_THD[:, num_rotated:])
        out_THD = torch.empty_like(query_THD)
        for span, rows in batch.spans:
            keys_KSD, values_KSD = batch.history(layer, span)
            out_THD[rows] = _attend(query_THD[rows], keys_KSD, values_KSD, span, shape)
        return out_THD.flatten(1)


class _PagedBatch:
    """A step's spans with their rows, and where the tokens of each lie in the cache."""

    def __init__(self, spans: Sequence[Span], cache: KVCache) -> None:
        self._cache = cache
        self._device = cache.keys_LNKDP.device
        self.spans: list[tuple[Span, slice]] = []
        pages: list[np.ndarray] = []
        offsets: list[np.ndarray] = []
        first_row = 0
        tokens = cache.shape.page_tokens
        for span in spans:
            positions = np.arange(span.start, span.start + span.num_rows)
            pages.append(span.table.pages[positions // tokens])
            offsets.append(positions % tokens)
            self.spans.append((span, slice(first_row, first_row + span.num_rows)))
            first_row += span.num_rows
        self._pages_T = self._on_device(np.concatenate(pages))
        self._offsets_T = self._on_device(np.concatenate(offsets))

    def write(self, layer: int, keys_TKD: torch.Tensor, values_TKD: torch.Tensor) -> None:
        """Stores the new keys and values of every row."""
        keys_NKDP, values_NKPD = self._cache.keys_LNKDP[layer], self._cache.values_LNKPD[layer]
        keys_NKDP[self._pages_T, :, :, self._offsets_T] = keys_TKD
        values_NKPD[self._pages_T, :, self._offsets_T] = values_TKD

    def history(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values [K, S, D] up to a span's last row."""
        end = span.start + span.num_rows
        pages = self._on_device(span.table.pages[: -(-end // self._cache.shape.page_tokens)])
        keys_nKDP = self._cache.keys_LNKDP[layer].index_select(0, pages)
        values_nKPD = self._cache.values_LNKPD[layer].index_select(0, pages)
        keys_KSD = keys_nKDP.permute(1, 0, 3, 2).flatten(1, 2)
        return keys_KSD[:, :end], values_nKPD.transpose(0, 1).flatten(1, 2)[:, :end]

    def _on_device(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self._device)


def _rotated(x_THD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    cos_T1D, sin_T1D = (part.unsqueeze(1) for part in rotation)
    first, second = x_THD.chunk(2, dim=-1)
    return (x_THD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D).to(x_THD.dtype)


def _attend(
    query_nHD: torch.Tensor,
    keys_KSD: torch.Tensor,
    values_KSD: torch.Tensor,
    span: Span,
    shape: AttentionShape,
) -> torch.Tensor:
    """Returns [n, H, D]; scores, soft cap and softmax in float32."""
    group = shape.num_heads // shape.num_kv_heads
    query_KGnD = query_nHD.transpose(0, 1).reshape(shape.num_kv_heads, group, -1, shape.head_dim)
    scores_KGnS = (query_KGnD @ keys_KSD.unsqueeze(1).mT).float() * shape.scaling
    if shape.softcap is not None:
        scores_KGnS = torch.tanh(scores_KGnS / shape.softcap) * shape.softcap
    device = query_nHD.device
    at_n1 = torch.arange(span.start, span.start + span.num_rows, device=device).unsqueeze(1)
    seen_1S = torch.arange(scores_KGnS.shape[-1], device=device).unsqueeze(0)
    hidden_nS = seen_1S > at_n1
    if shape.window is not None:
        hidden_nS = hidden_nS | (seen_1S <= at_n1 - shape.window)
    weights_KGnS = scores_KGnS.masked_fill(hidden_nS, float("-inf")).softmax(-1)
    out_KGnD = weights_KGnS.to(values_KSD.dtype) @ values_KSD.unsqueeze(1)
    return out_KGnD.flatten(0, 1).transpose(0, 1)
