"""What `CudaArithmetic` leaves to kernels, so that it can be tried where there are none.

Legend: T rows of the batch, X elements of a row, N pages, K key/value heads, D head size, P tokens
of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from linker_core.engine.arithmetic import Addend, AttentionShape, ByRow, Norm, Rotation
from linker_core.engine.cuda.step_tables import StepTables


class Kernels(Protocol):
    """Operations that no library has in the form the engine needs.

    None of them waits for the device, and none copies to it what it has seen before.
    """

    def normalize(
        self, x_TX: torch.Tensor, weights: ByRow, norm: Norm, out_TX: torch.Tensor
    ) -> None:
        """See `Arithmetic.normalize`."""

    def gate(self, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str) -> None:
        """See `Arithmetic.gate`."""

    def add_residuals(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        """See `Arithmetic.add_residuals`."""

    def rotate(
        self,
        qkv_TX: torch.Tensor,
        rotation: Rotation,
        tables: StepTables,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> None:
        """Rotates the queries in place, writes rotated keys and values to the rows' pages."""

    def attend(
        self,
        qkv_TX: torch.Tensor,
        tables: StepTables,
        out_TX: torch.Tensor,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> None:
        """Attends every row over its own sequence's pages, up to itself."""

    def begin(self) -> bool:
        """Is told of every step. Returns whether all that replays refer to is still there."""

    def forget(self) -> None:
        """Every replay has been dropped."""
