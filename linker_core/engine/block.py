"""A block as the engine computes it, over the routed leaves of a skeleton's layer.

Legend: T rows of the batch, H hidden size, I intermediate size, X queries, keys and values of all
heads one behind the other.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from linker_core.engine.arithmetic import AttentionShape, Rotation
from linker_core.engine.routing import RoutedLinear, RoutedNorm, multiply
from linker_core.engine.rows import StepContext


class Block:
    """One decoder layer.

    Args:
        layer: The skeleton's, its leaves routed.
        number: Which.
        shape: How it attends.
        activation: Of the MLP's gate, as the config names it.
        context: The family's step context.
    """

    def __init__(
        self,
        layer: Any,
        number: int,
        shape: AttentionShape,
        *,
        activation: str,
        context: StepContext,
    ) -> None:
        self._context = context
        self._attention = _Attention(layer.self_attn, number, shape, context)
        self._mlp = _MLP(layer.mlp, activation, context)
        self._before_attention: RoutedNorm = layer.input_layernorm
        self._before_mlp: RoutedNorm = layer.post_attention_layernorm
        self._after_attention: RoutedNorm | None = None
        self._after_mlp: RoutedNorm | None = None
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 2 has norms on both sides
            self._after_attention = layer.post_attention_layernorm
            self._before_mlp = layer.pre_feedforward_layernorm
            self._after_mlp = layer.post_feedforward_layernorm

    def __call__(self, x_TH: torch.Tensor, *, rotation: Rotation, batch: Any) -> None:
        """Adds what the block adds to the hidden states, in place.

        Args:
            x_TH: The hidden states.
            rotation: By row.
            batch: The step's, from `Arithmetic.prepare`.
        """
        part_TH = self._attention(self._before_attention(x_TH), rotation, batch)
        self._add(x_TH, part_TH, self._after_attention)
        self._add(x_TH, self._mlp(self._before_mlp(x_TH)), self._after_mlp)

    def _add(self, x_TH: torch.Tensor, part_TH: torch.Tensor, norm: RoutedNorm | None) -> None:
        if norm is not None:
            norm.normalize(part_TH, part_TH)
        self._context.arithmetic.add(x_TH, part_TH)


class _Attention:
    """Self-attention of every row over its own sequence's pages."""

    def __init__(
        self, original: Any, layer: int, shape: AttentionShape, context: StepContext
    ) -> None:
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

    def __call__(self, x_TH: torch.Tensor, rotation: Rotation, batch: Any) -> torch.Tensor:
        arithmetic = self._context.arithmetic
        qkv_TX = arithmetic.buffer("qkv", x_TH.shape[0], self._num_out, x_TH)
        parts = [
            qkv_TX.narrow(1, first, leaf.num_out)
            for first, leaf in zip(self._firsts, self._projections, strict=True)
        ]
        multiply(self._projections, x_TH, parts, self._context)
        for norm, part_TX in zip(self._norms, parts, strict=False):
            norm.normalize(part_TX, part_TX)
        attended_TX = arithmetic.attend(
            qkv_TX, rotation, batch, layer=self._layer, shape=self._shape
        )
        out_TH: torch.Tensor = self._out(attended_TX, "part")
        return out_TH


class _MLP:
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, original: Any, activation: str, context: StepContext) -> None:
        self._opening: tuple[RoutedLinear, ...] = (original.gate_proj, original.up_proj)
        self._down: RoutedLinear = original.down_proj
        self._activation, self._context = activation, context

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        width = self._opening[0].num_out
        both = self._context.arithmetic.buffer("opening", x_TH.shape[0], 2 * width, x_TH)
        gate_TI, up_TI = both.narrow(1, 0, width), both.narrow(1, width, width)
        multiply(self._opening, x_TH, (gate_TI, up_TI), self._context)
        self._context.arithmetic.gate(gate_TI, up_TI, self._activation)
        out_TH: torch.Tensor = self._down(gate_TI, "part")
        return out_TH
