"""What a block computes, as the routed leaves ask for it: the seam between devices.

`TorchArithmetic` says it in torch's own operations, for CUDA and as the plain path of the tests;
`linker_core.engine.cpu` has compiled loops for CPUs. Knows nothing of slots.

Legend: T rows of the batch, n rows of a group, I input features, O output features, H query heads,
K key/value heads, D head size, X = (H + 2 K) D, S positions of a history, P tokens of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from linker_core.engine.kv_cache import KVCache
from linker_core.engine.page_table import PageTable
from linker_core.engine.rows import RowGroup
from linker_core.residency.coding import CodedMatrix
from linker_core.residency.ledger import StoredResidual

_DELTA_ROWS = 4096  # of a delta that are in memory at a time, on the plain path


class ByRow(NamedTuple):
    """A tensor for every row of a batch, from a few."""

    tensors: Sequence[torch.Tensor]
    labels_T: torch.Tensor | None  # which of them a row has, int64; None: all have the first

    def gathered(self, rows: RowGroup, dtype: torch.dtype) -> torch.Tensor:
        """Returns the rows' tensors [n, …], or the one of all of them [1, …]."""
        if self.labels_T is None:
            return self.tensors[0].to(dtype).unsqueeze(0)
        stacked = torch.stack([tensor.to(dtype) for tensor in self.tensors])
        return stacked.index_select(0, rows.take(self.labels_T))


class Product(NamedTuple):
    """y = x Wᵀ + b of some rows."""

    weight_OI: torch.Tensor
    y_TO: torch.Tensor  # where it goes: a view whose last dimension is dense
    bias: ByRow | None  # [O]


class Addend(NamedTuple):
    """y += x Dᵀ of some rows, D being a compressed delta."""

    residual: StoredResidual
    rows: RowGroup
    y_TO: torch.Tensor  # a view whose last dimension is dense; as wide as D has rows


class Norm(NamedTuple):
    """x / sqrt(mean(x²) + eps) · w, or · (1 + w)."""

    eps: float
    plus_one: bool


class AttentionShape(NamedTuple):
    """How one layer attends."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None  # positions that a row sees, its own included
    softcap: float | None


class Code(NamedTuple):
    """How the elements of a coded matrix lie: all that decides which code reads them."""

    bits: int
    group: int  # elements that share a scale; 0 where a row has one or none


class Demand(NamedTuple):
    """What a model's steps ask for: all that decides which code they need."""

    weights: frozenset[torch.dtype]  # of products
    norm_weights: frozenset[torch.dtype]
    norm: Norm
    activation: str
    attention: frozenset[AttentionShape]
    page_tokens: int
    codes: frozenset[Code] = frozenset()  # of residuals


class Span(NamedTuple):
    """The rows of one sequence in a batch: positions `start` to `start + num_rows - 1`."""

    start: int
    num_rows: int
    table: PageTable  # with room for every position


class Rotation(NamedTuple):
    """Cosines and sines of every row's position, float32 [T, D]."""

    cos_TD: torch.Tensor
    sin_TD: torch.Tensor


class Arithmetic(Protocol):
    """The operations of a block. Used by one thread, for one family.

    What is computed within `run` goes through these operations alone, and through `buffer` for
    every tensor that does not last longer than the step.
    """

    def warm_up(self, demand: Demand) -> None:
        """Makes ready what would hold the first such step up, which may take seconds.

        The one operation that another thread may call, beside steps.
        """

    def buffer(self, name: str, num_rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """Returns room [num_rows, width] of the type and on the device of `like`.

        Its content lasts until a buffer of that name is asked for again.
        """

    def run(self, key: Hashable | None, body: Callable[[], None]) -> None:
        """Runs `body`, which may be recorded and replayed when the key comes again.

        Args:
            key: Tells what `body` does, and to tensors of which sizes; None if it never comes
                again. What it reads lies in buffers and in what `prepare` returned.
            body: Uses these operations.
        """

    def forget(self) -> None:
        """Drops what was recorded: weights may go."""

    def add(self, x_TH: torch.Tensor, y_TH: torch.Tensor) -> None:
        """Adds `y_TH` to `x_TH` in place."""

    def multiply(self, x_TI: torch.Tensor, rows: RowGroup, products: Sequence[Product]) -> None:
        """Computes products of the same rows of x; the other rows of y stay as they are."""

    def add_residuals(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        """Adds products with deltas to what is there, of each addend's own rows.

        Args:
            x_TI: What all of them multiply.
            addends: Mostly a variant's each; no two add to the same place.
        """

    def normalize(
        self, x_TX: torch.Tensor, weights: ByRow, norm: Norm, out_TX: torch.Tensor
    ) -> None:
        """Normalises every run of as many elements as the weights have, each by itself.

        Args:
            x_TX: [T, …], the last dimension a multiple of the weights' length.
            weights: [width].
            norm: Which.
            out_TX: Where it goes; may be `x_TX`.
        """

    def gate(self, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str) -> None:
        """Overwrites `gate_TI` by activation(gate) · up."""

    def prepare(self, spans: Sequence[Span], cache: KVCache) -> Any:
        """Returns what `attend` needs of a step, worked out once for all layers."""

    def attend(
        self,
        qkv_TX: torch.Tensor,
        rotation: Rotation,
        batch: Any,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> torch.Tensor:
        """Rotates queries and keys, writes keys and values to their pages, attends every row.

        Args:
            qkv_TX: Queries, keys, values; may be overwritten.
            rotation: By row.
            batch: What `prepare` returned.
            layer: Whose pages.
            shape: Of the layer.

        Returns:
            [T, H D].
        """


def code_of(matrix: CodedMatrix) -> Code:
    """Returns what reads a matrix."""
    return Code(matrix.bits, matrix.group if matrix.bits < 8 else 0)


def codes_of(residual: StoredResidual) -> frozenset[Code]:
    """Returns what reads a residual's parts."""
    parts = (residual.dense, residual.down, residual.up)
    return frozenset(code_of(part) for part in parts if part is not None)


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
