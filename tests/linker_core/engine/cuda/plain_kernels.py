"""The kernels' definition in torch's operations, over the same tables on the device.

Legend: T rows of the batch, H query heads, K key/value heads, D head size, P tokens of a page,
N positions of the longest history.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from linker_core.engine.arithmetic import Addend, AttentionShape, ByRow, Norm, Rotation
from linker_core.engine.cuda.step_tables import ITEM_ROWS, StepTables
from linker_core.engine.torch_arithmetic import TorchArithmetic


class PlainKernels:
    """Reads of a step nothing but its tables, as a captured kernel does.

    Args:
        num_positions: No history is longer.
    """

    def __init__(self, *, num_positions: int) -> None:
        self._plain = TorchArithmetic()
        self._num_positions = num_positions

    def normalize(
        self, x_TX: torch.Tensor, weights: ByRow, norm: Norm, out_TX: torch.Tensor
    ) -> None:
        self._plain.normalize(x_TX, weights, norm, out_TX)

    def gate(self, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str) -> None:
        self._plain.gate(gate_TI, up_TI, activation)

    def add_residuals(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        self._plain.add_residuals(x_TI, addends)

    def rotate(
        self,
        qkv_TX: torch.Tensor,
        rotation: Rotation,
        tables: StepTables,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> None:
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        x_THD = qkv_TX.view(len(qkv_TX), -1, shape.head_dim)
        rotated_THD = x_THD[:, : heads + kv_heads]
        first, second = rotated_THD.chunk(2, dim=-1)
        turned_THD = torch.cat((-second, first), dim=-1)
        cos_T1D, sin_T1D = rotation.cos_TD.unsqueeze(1), rotation.sin_TD.unsqueeze(1)
        rotated_THD.copy_(rotated_THD * cos_T1D + turned_THD * sin_T1D)
        cache = tables.cache
        page_T = tables.targets_T.long() // cache.shape.page_tokens
        offset_T = tables.targets_T.long() % cache.shape.page_tokens
        cache.keys_LNKDP[layer][page_T, :, :, offset_T] = rotated_THD[:, heads:]
        cache.values_LNKPD[layer][page_T, :, offset_T] = x_THD[:, heads + kv_heads :]

    def attend(
        self,
        qkv_TX: torch.Tensor,
        tables: StepTables,
        out_TX: torch.Tensor,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> None:
        position_T, first_page_T = self._rows(tables)
        cache, seen_N = tables.cache, torch.arange(self._num_positions)
        place_TN = first_page_T[:, None] + seen_N // cache.shape.page_tokens
        # Behind a sequence's own pages lie others', or none; nothing of them is visible.
        page_TN = tables.pages_N[place_TN.clamp(max=len(tables.pages_N) - 1)].long()
        offset_N = seen_N % cache.shape.page_tokens
        hidden_TN = seen_N > position_T[:, None]
        if shape.window is not None:
            hidden_TN = hidden_TN | (seen_N <= position_T[:, None] - shape.window)
        group = shape.num_heads // shape.num_kv_heads
        keys_TNKD = cache.keys_LNKDP[layer][page_TN, :, :, offset_N]
        values_TNKD = cache.values_LNKPD[layer][page_TN, :, offset_N]
        # What pages held before may be anything.
        values_TNKD = values_TNKD.masked_fill(hidden_TN[:, :, None, None], 0.0)
        query_THD = qkv_TX.view(len(qkv_TX), -1, shape.head_dim)[:, : shape.num_heads]
        query_TKGD = query_THD.reshape(len(qkv_TX), -1, group, shape.head_dim)
        scores_TKGN = torch.einsum("tkgd,tnkd->tkgn", query_TKGD, keys_TNKD).float()
        scores_TKGN = scores_TKGN * shape.scaling
        if shape.softcap is not None:
            scores_TKGN = torch.tanh(scores_TKGN / shape.softcap) * shape.softcap
        scores_TKGN = scores_TKGN.masked_fill(hidden_TN[:, None, None], float("-inf"))
        weights_TKGN = scores_TKGN.softmax(-1).to(values_TNKD.dtype)
        out_TX.copy_(torch.einsum("tkgn,tnkd->tkgd", weights_TKGN, values_TNKD).flatten(1))

    def begin(self) -> bool:
        return True

    def forget(self) -> None:
        """Nothing is kept."""

    def _rows(self, tables: StepTables) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns every row's position, and where its sequence's pages begin."""
        first_J, num_rows_J, start_J, page_J = tables.items_J4.long().unbind(1)
        row_T = torch.arange(tables.num_rows)
        item_T = torch.searchsorted(first_J.contiguous(), row_T, right=True) - 1
        inside_T = row_T - first_J[item_T]
        # Items cover the rows exactly; a row outside of its own sees nothing, which gives NaN.
        is_inside_T = (inside_T < num_rows_J[item_T]) & (inside_T < ITEM_ROWS)
        return torch.where(is_inside_T, start_J[item_T] + inside_T, -1), page_J[item_T]
