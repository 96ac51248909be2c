"""The product of activations with a stored weight: the seam where a faster kernel goes in.

Weights lie in memory as the checkpoint's words. Where the activations have another dtype (float32
on the CPU over bfloat16 words), a tile of output rows at a time is widened into one scratch buffer
that is reused for every product, so no model-sized copy is ever made. Knows nothing of variants.

Legend: T rows of the batch, I input features, O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Large enough that a tile's product outweighs its launch, small enough for the last-level cache.
SCRATCH_BYTES = 4 * 2**20


class LinearProduct:
    """Computes `x Wᵀ + b`; owns the scratch buffer, so one instance serves one thread."""

    def __init__(self, *, scratch_bytes: int = SCRATCH_BYTES) -> None:
        self._scratch_bytes = scratch_bytes
        self._scratch: torch.Tensor | None = None

    def __call__(
        self, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns `x_TI @ weight_OI.T + bias_O` as a contiguous [T, O] in the dtype of `x_TI`.

        Arithmetic is in the dtype of `x_TI`; a weight or bias of another dtype is widened first.
        """
        if bias_O is not None:
            bias_O = bias_O.to(x_TI.dtype)
        if weight_OI.dtype == x_TI.dtype:
            return F.linear(x_TI, weight_OI, bias_O)
        y_TO = self._tiled(x_TI, weight_OI)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    def _tiled(self, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        num_out, num_in = weight_OI.shape
        scratch = self._scratch_for(x_TI, num_in)
        tile_rows = min(num_out, scratch.numel() // num_in)
        x_IT = x_TI.t()
        # Output features as rows: each tile then writes one contiguous piece.
        y_OT = x_TI.new_empty(num_out, x_TI.shape[0])
        for first in range(0, num_out, tile_rows):
            words = weight_OI[first : first + tile_rows]
            tile = scratch[: words.numel()].view(words.shape)
            tile.copy_(words)
            torch.mm(tile, x_IT, out=y_OT[first : first + tile_rows])
        return y_OT.t().contiguous()

    def _scratch_for(self, x_TI: torch.Tensor, num_in: int) -> torch.Tensor:
        """Returns the buffer; it holds at least one row of `num_in` numbers."""
        wanted = max(num_in, self._scratch_bytes // x_TI.element_size())
        scratch = self._scratch
        if scratch is None or scratch.numel() < num_in or scratch.dtype != x_TI.dtype:
            scratch = x_TI.new_empty(wanted)
            self._scratch = scratch
        return scratch
