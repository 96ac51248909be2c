"""Attention and MLP of a block as the engine computes them, in place of the Hugging Face modules.

The modules around them, which decide what is added to what, stay as they are.

Legend: T rows of the batch, H hidden size, I intermediate size, X queries, keys and values of all
heads one behind the other.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import nn

from linker_core.engine.arithmetic import AttentionShape, Rotation
from linker_core.engine.routing import RoutedLinear, RoutedNorm, multiply
from linker_core.engine.rows import StepContext


class PagedAttention(nn.Module):
    """Self-attention of every row over its own sequence's pages.

    Args:
        original: The module that is replaced, its leaves routed.
        layer: Its number.
        shape: How it attends.
        context: The family's step context.
    """

    def __init__(
        self, original: Any, layer: int, shape: AttentionShape, context: StepContext
    ) -> None:
        super().__init__()
        self._projections: tuple[RoutedLinear, ...] = (
            original.q_proj,
            original.k_proj,
            original.v_proj,
        )
        *self._firsts, self._num_out = accumulate(
            (leaf.num_out for leaf in self._projections), initial=0
        )
        self._out: RoutedLinear = original.o_proj
        # Qwen 3 normalises every head of queries and keys.
        self._norms: tuple[RoutedNorm, ...] = ()
        if hasattr(original, "q_norm"):
            self._norms = (original.q_norm, original.k_norm)
        self._layer, self._shape, self._context = layer, shape, context

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: Rotation,
        batch: Any,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Returns [1, T, H], and None for the weights.

        Args:
            hidden_states: [1, T, H].
            position_embeddings: Of every row.
            batch: The step's, from `Arithmetic.prepare`.
        """
        x_TH = hidden_states[0]
        qkv_TX = x_TH.new_empty(x_TH.shape[0], self._num_out)
        parts = [
            qkv_TX.narrow(1, first, leaf.num_out)
            for first, leaf in zip(self._firsts, self._projections, strict=True)
        ]
        multiply(self._projections, x_TH, parts, self._context)
        for norm, part_TX in zip(self._norms, parts, strict=False):
            norm.normalize(part_TX, part_TX)
        attended_TX = self._context.arithmetic.attend(
            qkv_TX, position_embeddings, batch, layer=self._layer, shape=self._shape
        )
        return self._out(attended_TX.unsqueeze(0)), None


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)).

    Args:
        original: The module that is replaced, its leaves routed.
        activation: As the config names it.
        context: The family's step context.
    """

    def __init__(self, original: Any, activation: str, context: StepContext) -> None:
        super().__init__()
        self._opening: tuple[RoutedLinear, ...] = (original.gate_proj, original.up_proj)
        self._down: RoutedLinear = original.down_proj
        self._activation, self._context = activation, context

    def forward(self, x_1TH: torch.Tensor) -> torch.Tensor:
        """Returns [1, T, H]."""
        x_TH = x_1TH[0]
        width = self._opening[0].num_out
        both = x_TH.new_empty(x_TH.shape[0], 2 * width)
        gate_TI, up_TI = both.narrow(1, 0, width), both.narrow(1, width, width)
        multiply(self._opening, x_TH, (gate_TI, up_TI), self._context)
        self._context.arithmetic.gate(gate_TI, up_TI, self._activation)
        out: torch.Tensor = self._down(gate_TI.unsqueeze(0))
        return out
