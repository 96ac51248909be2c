"""Launches of the Triton kernels, with tiles chosen by shape.

Legend: T rows of the batch, X elements of a row, I intermediate size, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from linker_core.engine.arithmetic import Addend, AttentionShape, ByRow, Norm, Rotation
from linker_core.engine.cuda.attention_kernels import attend_items, join_parts, rotate_rows
from linker_core.engine.cuda.residual_launches import ResidualLaunches
from linker_core.engine.cuda.row_kernels import gate_rows, normalize_runs
from linker_core.engine.cuda.step_tables import StepTables
from linker_core.engine.torch_arithmetic import TorchArithmetic
from linker_core.engine.uploads import upload

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
_GATE_BLOCK = 1024
_SMALLEST_TILE = 16  # of a tensor-core product
_PREFILL_TILE = 64
_MAX_PARTS = 16  # of a history
_MAX_ADDRESSES = 1 << 16  # lists of weights that are kept on the device


class TritonKernels:
    """See `Kernels`.

    Args:
        num_processors: Of the device. Histories of few sequences are split until all have work.
    """

    def __init__(self, *, num_processors: int) -> None:
        self._num_processors = num_processors
        self._plain = TorchArithmetic()
        self._residuals = ResidualLaunches()
        self._addresses: dict[tuple[int, ...], torch.Tensor] = {}

    def normalize(
        self, x_TX: torch.Tensor, weights: ByRow, norm: Norm, out_TX: torch.Tensor
    ) -> None:
        """See `Kernels.normalize`."""
        tensors, labels_T = weights
        if len({tensor.dtype for tensor in tensors}) > 1:
            self._plain.normalize(x_TX, weights, norm, out_TX)
            return
        num_rows, num_elements = x_TX.shape
        width = len(tensors[0])
        lies_at = tensors[0] if labels_T is None else self._addresses_of(tensors)
        normalize_runs[(num_rows, num_elements // width)](
            *(x_TX, x_TX.stride(0), out_TX, out_TX.stride(0)),
            *(lies_at, labels_T, norm.eps),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            PLUS_ONE=norm.plus_one,
            BY_ROW=labels_T is not None,
            WEIGHT_TYPE=_TYPES[tensors[0].dtype],
            num_warps=8 if width > 1024 else 4,
        )

    def gate(self, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str) -> None:
        """See `Kernels.gate`."""
        assert activation in _ACTIVATIONS, activation
        num_rows, width = gate_TI.shape
        gate_rows[(num_rows, triton.cdiv(width, _GATE_BLOCK))](
            *(gate_TI, gate_TI.stride(0), up_TI, up_TI.stride(0), width),
            ACTIVATION=activation,
            BLOCK=_GATE_BLOCK,
        )

    def add_residuals(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        """See `Arithmetic.add_residuals`."""
        self._residuals.add(x_TI, addends)

    def rotate(
        self,
        qkv_TX: torch.Tensor,
        rotation: Rotation,
        tables: StepTables,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> None:
        """See `Kernels.rotate`."""
        cache = tables.cache
        rotate_rows[(len(qkv_TX), shape.num_heads + 2 * shape.num_kv_heads)](
            *(qkv_TX, qkv_TX.stride(0), rotation.cos_TD, rotation.sin_TD),
            *(cache.keys_LNKDP[layer], cache.values_LNKPD[layer], tables.targets_T),
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            PAGE_TOKENS=cache.shape.page_tokens,
            BLOCK_HALF=triton.next_power_of_2(shape.head_dim // 2),
            num_warps=1,
        )

    def attend(
        self,
        qkv_TX: torch.Tensor,
        tables: StepTables,
        out_TX: torch.Tensor,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> None:
        """See `Kernels.attend`."""
        cache, num_rows = tables.cache, len(qkv_TX)
        group = shape.num_heads // shape.num_kv_heads
        decodes = tables.max_item_rows == 1
        tile = max(_SMALLEST_TILE, triton.next_power_of_2(group))
        tile = tile if decodes else max(tile, _PREFILL_TILE)
        num_parts = self._num_parts(num_rows * shape.num_kv_heads) if decodes else 1
        num_tiles = triton.cdiv(tables.max_item_rows, tile // group)
        block_dim = max(_SMALLEST_TILE, triton.next_power_of_2(shape.head_dim))
        part_THSD = sums_THS2 = out_TX
        if num_parts > 1:
            sizes = (num_rows, shape.num_heads, num_parts)
            part_THSD = out_TX.new_empty((*sizes, shape.head_dim), dtype=torch.float32)
            sums_THS2 = out_TX.new_empty((*sizes, 2), dtype=torch.float32)
        attend_items[(len(tables.items_J4), shape.num_kv_heads, num_tiles * num_parts)](
            *(qkv_TX, qkv_TX.stride(0), cache.keys_LNKDP[layer], cache.values_LNKPD[layer]),
            *(tables.items_J4, tables.pages_N, out_TX, out_TX.stride(0)),
            *(part_THSD, sums_THS2, shape.scaling),
            NUM_KV_HEADS=shape.num_kv_heads,
            GROUP=group,
            HEAD_DIM=shape.head_dim,
            PAGE_TOKENS=cache.shape.page_tokens,
            WINDOW=shape.window or 0,
            SOFTCAP=shape.softcap or 0.0,
            BLOCK_M=tile,
            BLOCK_N=64 if block_dim <= 128 else 32,
            BLOCK_D=block_dim,
            NUM_PARTS=num_parts,
            num_warps=4 if block_dim <= 128 else 8,
            num_stages=2,
        )
        if num_parts > 1:
            join_parts[(num_rows, shape.num_heads)](
                *(part_THSD, sums_THS2, out_TX, out_TX.stride(0)),
                HEAD_DIM=shape.head_dim,
                BLOCK_D=block_dim,
                NUM_PARTS=num_parts,
            )

    def begin(self) -> bool:
        """See `Kernels.begin`."""
        return len(self._addresses) + len(self._residuals) <= _MAX_ADDRESSES

    def forget(self) -> None:
        """See `Kernels.forget`."""
        self._addresses.clear()
        self._residuals.forget()

    def _num_parts(self, num_programs: int) -> int:
        """Returns a power of two; it depends on nothing that a replay may find changed."""
        wanted = triton.cdiv(2 * self._num_processors, num_programs)
        return min(_MAX_PARTS, int(triton.next_power_of_2(wanted)))

    def _addresses_of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        found = self._addresses.get(addresses)
        if found is None:
            found = upload(np.array(addresses, np.int64), tensors[0].device)
            self._addresses[addresses] = found
        return found
