"""What a block computes, as the routed leaves ask for it: the seam between devices.

`torch_arithmetic` says it in torch's own operations; `linker_core.engine.cpu` has compiled loops,
`linker_core.engine.cuda` Triton kernels. Knows nothing of slots.

Legend: T rows of the batch, n rows of a group, I input features, O output features, H query heads,
K key/value heads, D head size, X = (H + 2 K) D.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from linker_core.engine.kv_cache import KVCache
from linker_core.engine.page_table import PageTable
from linker_core.engine.rows import RowGroup
from linker_core.residency.coding import CodedMatrix
from linker_core.residency.stored import StoredResidual


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
