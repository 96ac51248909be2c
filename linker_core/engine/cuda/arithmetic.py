"""The operations of a block on a CUDA device: bfloat16 rows over the checkpoint's words.

Products are cuBLAS's, straight into where they go; the rest is kernels. Nothing waits for the
device. A weight in another type than the activations is converted anew for every product: a second
form of it would be a second copy.

Legend: T rows of the batch, n rows of a group, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

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
from linker_core.engine.cuda.graphs import Capture, Replays
from linker_core.engine.cuda.kernels import Kernels
from linker_core.engine.cuda.step_tables import StepTables
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.rows import RowGroup

_MAX_REPLAYS = 128  # of the sets of rows that were computed last


class CudaArithmetic:
    """Library products and kernels over buffers that stay, captured per set of rows.

    Args:
        kernels: For what is no product.
        capture: Makes replays of steps that come again; None: every step is launched anew.
    """

    def __init__(self, kernels: Kernels, capture: Capture | None) -> None:
        self._kernels = kernels
        self._buffers: dict[str, torch.Tensor] = {}
        self._tables = StepTables()
        self._replays = Replays(capture, limit=_MAX_REPLAYS)

    def warm_up(self, demand: Demand) -> None:
        """See `Arithmetic.warm_up`; Triton compiles what it is first launched with."""

    def buffer(self, name: str, num_rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """See `Arithmetic.buffer`."""
        found = self._buffers.get(name)
        if found is None or found.shape[0] < num_rows:
            rows = 1 << (num_rows - 1).bit_length()
            found = self._buffers[name] = like.new_empty(rows, width)
            self.forget()
        assert found.shape[1] == width, name
        return found[:num_rows]

    def run(self, key: Hashable | None, body: Callable[[], None]) -> None:
        """See `Arithmetic.run`."""
        self._replays.run(key, body)

    def forget(self) -> None:
        """See `Arithmetic.forget`."""
        self._replays.forget()
        self._kernels.forget()

    def add(self, x_TH: torch.Tensor, y_TH: torch.Tensor) -> None:
        """See `Arithmetic.add`."""
        x_TH.add_(y_TH)

    def multiply(self, x_TI: torch.Tensor, rows: RowGroup, products: Sequence[Product]) -> None:
        """See `Arithmetic.multiply`."""
        self._replays.keep(rows.indices_n)
        x_nI = rows.take(x_TI)
        for weight_OI, y_TO, bias in products:
            if bias is not None and bias.labels_T is not None:
                self._replays.keep(bias.labels_T)
            if rows.run is not None:
                _product(x_nI, weight_OI, bias, rows, y_TO[rows.run])
            else:
                y_nO = x_TI.new_empty(len(x_nI), len(weight_OI))
                _product(x_nI, weight_OI, bias, rows, y_nO)
                y_TO.index_copy_(0, rows.indices_n, y_nO)

    def add_residuals(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        """See `Arithmetic.add_residuals`."""
        for addend in addends:
            self._replays.keep(addend.rows.indices_n)
        self._kernels.add_residuals(x_TI, addends)

    def normalize(
        self, x_TX: torch.Tensor, weights: ByRow, norm: Norm, out_TX: torch.Tensor
    ) -> None:
        """See `Arithmetic.normalize`."""
        if weights.labels_T is not None:
            self._replays.keep(weights.labels_T)
        self._kernels.normalize(x_TX, weights, norm, out_TX)

    def gate(self, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str) -> None:
        """See `Arithmetic.gate`."""
        self._kernels.gate(gate_TI, up_TI, activation)

    def prepare(self, spans: Sequence[Span], cache: KVCache) -> StepTables:
        """See `Arithmetic.prepare`."""
        is_known = self._tables.fill(spans, cache)
        if not self._kernels.begin() or not is_known:
            self.forget()
        return self._tables

    def attend(
        self,
        qkv_TX: torch.Tensor,
        rotation: Rotation,
        batch: StepTables,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> torch.Tensor:
        """See `Arithmetic.attend`."""
        width = shape.num_heads * shape.head_dim
        out_TX = self.buffer("attended", qkv_TX.shape[0], width, qkv_TX)
        self._kernels.rotate(qkv_TX, rotation, batch, layer=layer, shape=shape)
        self._kernels.attend(qkv_TX, batch, out_TX, layer=layer, shape=shape)
        return out_TX


def _product(
    x_nI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias: ByRow | None,
    rows: RowGroup,
    out_nO: torch.Tensor,
) -> None:
    """Writes x Wᵀ + b; the last dimension of `out_nO` is dense."""
    weight_IO = weight_OI.to(x_nI.dtype).t()
    if bias is None:
        torch.mm(x_nI, weight_IO, out=out_nO)
    elif bias.labels_T is None:
        torch.addmm(bias.tensors[0].to(x_nI.dtype), x_nI, weight_IO, out=out_nO)
    else:
        torch.mm(x_nI, weight_IO, out=out_nO)
        out_nO += bias.gathered(rows, x_nI.dtype)
