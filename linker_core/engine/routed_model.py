"""A Hugging Face model whose leaves serve many variants, run section by section.

Legend: T rows of the batch, H hidden size, V widest vocabulary among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from linker_core.engine.arithmetic import (
    AttentionShape,
    Code,
    Demand,
    Norm,
    Rotation,
    codes_of,
)
from linker_core.engine.block import Block
from linker_core.engine.leaf import RoutedLeaf, Tensors
from linker_core.engine.routing import RoutedLinear, RoutedNorm
from linker_core.engine.rows import StepContext
from linker_core.engine.token_leaves import RoutedEmbedding, RoutedHead
from linker_core.residency.skeleton import build_skeleton
from linker_core.residency.stored import StoredResidual, StoredRows
from linker_core.weights.architecture import SLIDING, Architecture, ModelConfig

_ROTATION_BLOCK = 1024  # positions whose cosines and sines are worked out together


class RoutedModel:
    """The skeleton of a family with routed leaves, none of them bound to any slot.

    Args:
        config: The family's shape.
        context: What the leaves read at each step.
        device: Where everything lies.
        dtype: Of the activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: StepContext,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.context = context
        self._model: Any = build_skeleton(config, device=device, dtype=dtype)
        self.leaves = _route(self._model, config, context, dtype)
        body = self._model.model
        self._blocks = [
            Block(
                layer,
                number,
                attention_shape(config, number),
                activation=config.hidden_act,
                context=context,
            )
            for number, layer in enumerate(body.layers)
        ]
        self._rotations = _Rotations(body.rotary_emb, device=device, dtype=dtype)

    @property
    def slots(self) -> list[int]:
        """The slots that are bound."""
        return list(self.leaves[0].stored)

    def demand(self, tensors: Tensors, *, page_tokens: int) -> Demand:
        """Returns what steps over `tensors` will ask of the arithmetic.

        Args:
            tensors: Of a model, by checkpoint name.
            page_tokens: Tokens of a page of the KV cache.

        Raises:
            KeyError: A leaf has no tensor.
        """
        weights: set[torch.dtype] = set()
        norm_weights: set[torch.dtype] = set()
        codes: set[Code] = set()
        for leaf in self.leaves:
            if isinstance(leaf, RoutedEmbedding):
                continue
            stored = tensors[f"{leaf.leaf_name}.weight"]
            found = norm_weights if isinstance(leaf, RoutedNorm) else weights
            found.add(stored.base.tensor.dtype)
            if isinstance(stored, StoredRows):
                found.add(stored.own.dtype)
            elif isinstance(stored, StoredResidual):
                found |= {stored.extra.dtype} if len(stored.extra) else set()
                codes |= codes_of(stored)
        return Demand(
            weights=frozenset(weights),
            norm_weights=frozenset(norm_weights),
            norm=_norm(self.config),
            activation=self.config.hidden_act,
            attention=frozenset(
                attention_shape(self.config, layer) for layer in range(self.config.num_layers)
            ),
            page_tokens=page_tokens,
            codes=frozenset(codes),
        )

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Returns the first hidden states [T, H]."""
        out: torch.Tensor = self._model.model.embed_tokens(ids_T.unsqueeze(0))[0]
        return out

    def rotation(self, positions_T: torch.Tensor, num_positions: int) -> Rotation:
        """Returns the rotation of every row, in buffers of the step.

        Args:
            positions_T: Of the rows.
            num_positions: More than the largest of them; the device is not asked for it.
        """
        buffer, width = self.context.arithmetic.buffer, self.config.head_dim
        parts = []
        for name, known in self._rotations.up_to(num_positions)._asdict().items():
            out_TD = buffer(name, len(positions_T), width, known)
            parts.append(torch.index_select(known, 0, positions_T, out=out_TD))
        return Rotation(*parts)

    def block(self, layer: int, x_TH: torch.Tensor, *, rotation: Rotation, batch: Any) -> None:
        """Runs a block over the hidden states, in place.

        Args:
            layer: Which.
            x_TH: Hidden states before it, then behind it.
            rotation: By row.
            batch: The step's, from `Arithmetic.prepare`.
        """
        self._blocks[layer](x_TH, rotation=rotation, batch=batch)

    def final_norm(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Returns what the head reads, [T, H], in a buffer of the norms."""
        out: torch.Tensor = self._model.model.norm(x_TH)
        return out

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Returns [T, V] of the rows that `context.head` maps."""
        logits_TV: torch.Tensor = self._model.lm_head(x_TH.unsqueeze(0))[0]
        cap = self.config.final_logit_softcapping
        return logits_TV if cap is None else logits_TV.div_(cap).tanh_().mul_(cap)


def attention_shape(config: ModelConfig, layer: int) -> AttentionShape:
    """Returns how a layer attends."""
    scale_by = config.query_pre_attn_scalar or config.head_dim
    sliding = config.layer_types[layer] == SLIDING
    return AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scaling=scale_by**-0.5,
        window=config.sliding_window if sliding else None,
        softcap=config.attn_logit_softcapping,
    )


def _norm(config: ModelConfig) -> Norm:
    return Norm(config.rms_norm_eps, plus_one=config.architecture is Architecture.GEMMA2)


class _Rotations:
    """Cosines and sines by position, worked out a block of positions at a time as they are needed.

    A position's are then the same in every step, to the last bit.
    """

    def __init__(self, rotary: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self._rotary = rotary
        self._like = torch.empty(0, dtype=torch.float32, device=device)
        self._dtype = dtype
        self._known: Rotation | None = None

    def up_to(self, num_positions: int) -> Rotation:
        """Returns the rotation of at least so many positions from the first on."""
        known = self._known
        while known is None or len(known.cos_TD) < num_positions:
            first = 0 if known is None else len(known.cos_TD)
            positions = torch.arange(first, first + _ROTATION_BLOCK, device=self._like.device)
            more = [part[0] for part in self._rotary(self._like, positions.unsqueeze(0))]
            known = Rotation(
                *(more if known is None else map(torch.cat, zip(known, more, strict=True)))
            )
            self._known = known
        return known


def _route(
    model: nn.Module, config: ModelConfig, context: StepContext, dtype: torch.dtype
) -> list[RoutedLeaf]:
    """Replaces every leaf that has parameters, in place; returns the new ones."""
    leaves: list[RoutedLeaf] = []
    norm = _norm(config)
    for name, module in list(model.named_modules()):
        if not list(module.named_parameters(recurse=False)):
            continue
        assert not list(module.children()), f"{name} has parameters and children"
        leaf: RoutedLeaf
        if isinstance(module, nn.Embedding):
            leaf = RoutedEmbedding(name, module, context, dtype=dtype)
        elif not isinstance(module, nn.Linear):
            leaf = RoutedNorm(name, module, context, norm)
        elif name == "lm_head":
            leaf = RoutedHead(name, module, context)
        else:
            leaf = RoutedLinear(name, module, context)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, leaf)
        leaves.append(leaf)
    assert not list(model.parameters())
    return leaves
