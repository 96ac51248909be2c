"""The leaves of a Hugging Face model, each serving many variants from many storages.

Rows of a batch are grouped by storage: variants that alias one storage fall into one product.

Legend: T rows of the batch, I input features, O output features, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from linker_core.engine.leaf import RoutedLeaf, Tensors
from linker_core.engine.rows import RowMap, StepContext, put_rows, take_rows
from linker_core.engine.token_leaves import RoutedEmbedding, RoutedHead
from linker_core.residency.ledger import StoredTensor


class RoutedLinear(RoutedLeaf):
    """A linear layer: one product for each distinct weight among the rows."""

    def forward(self, x_1TI: torch.Tensor) -> torch.Tensor:
        """Returns [1, T, O]."""
        return self._product(x_1TI[0], self._body()).unsqueeze(0)

    def _product(self, x_TI: torch.Tensor, rows: RowMap) -> torch.Tensor:
        labels, weights = self.partition(rows, "weight")
        if "bias" not in self.parameter_names:
            return self._grouped(x_TI, rows, labels, weights, None)
        bias_labels, biases = self.partition(rows, "bias")
        if labels == bias_labels:
            return self._grouped(x_TI, rows, labels, weights, biases)
        # Under `exact` a bias may alias where the weight does not, and the reverse: the product
        # follows the weights alone and the biases are added by their own groups.
        y_TO = self._grouped(x_TI, rows, labels, weights, None)
        for group, bias in zip(rows.groups(bias_labels), biases, strict=True):
            bias_O = bias.tensor.to(y_TO.dtype)
            put_rows(y_TO, group, take_rows(y_TO, group) + bias_O)
        return y_TO

    def _grouped(
        self,
        x_TI: torch.Tensor,
        rows: RowMap,
        labels: tuple[int, ...],
        weights: Sequence[StoredTensor],
        biases: Sequence[StoredTensor] | None,
    ) -> torch.Tensor:
        def product(part_TI: torch.Tensor, group: int) -> torch.Tensor:
            bias_O = None if biases is None else biases[group].tensor
            return self.context.linear(part_TI, weights[group].tensor, bias_O)

        if len(weights) == 1:
            return product(x_TI, 0)
        y_TO = x_TI.new_empty(len(x_TI), weights[0].num_rows)
        for index, group in enumerate(rows.groups(labels)):
            put_rows(y_TO, group, product(take_rows(x_TI, group), index))
        return y_TO


class RoutedNorm(RoutedLeaf):
    """A norm: one clone of the original leaf for each distinct storage.

    The clone computes (Gemma's `1 + w` included) and type promotion widens the stored words.
    """

    def __init__(self, name: str, original: nn.Module, context: StepContext) -> None:
        super().__init__(name, original, context)
        assert self.parameter_names == ("weight",)
        # Held in a tuple so that the template is not registered as a submodule.
        self._template = (original,)
        self._clones: dict[StoredTensor, nn.Module] = {}

    def bind(self, slot: int, tensors: Tensors) -> None:
        super().bind(slot, tensors)
        weight = self.stored[slot]["weight"]
        if weight not in self._clones:
            self._clones[weight] = _clone_over(self._template[0], weight.tensor)

    def unbind(self, slot: int) -> None:
        weight = self.stored[slot]["weight"]
        super().unbind(slot)
        if all(stored["weight"] is not weight for stored in self.stored.values()):
            del self._clones[weight]

    def forward(self, x_1T: torch.Tensor) -> torch.Tensor:
        """Returns the normalised rows; `x_1T` is [1, T, …, H]."""
        rows = self._body()
        labels, weights = self.partition(rows, "weight")
        if len(weights) == 1:
            return self._normalised(weights[0], x_1T)
        x_T = x_1T[0]
        out_T = torch.empty_like(x_T)
        for group, weight in zip(rows.groups(labels), weights, strict=True):
            put_rows(out_T, group, self._normalised(weight, take_rows(x_T, group)))
        return out_T.unsqueeze(0)

    def _normalised(self, weight: StoredTensor, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._clones[weight](x)
        return out.to(x.dtype)  # a wider stored dtype must not widen what follows


def _clone_over(original: nn.Module, weight: torch.Tensor) -> nn.Module:
    """Returns a copy of `original` that computes with `weight` itself, not with a copy of it."""
    clone = copy.deepcopy(original)
    del clone.weight
    # A plain attribute: a Parameter would be a second tensor object over the same storage.
    clone.weight = weight
    return clone


def route_model(model: nn.Module, context: StepContext, *, dtype: torch.dtype) -> list[RoutedLeaf]:
    """Replaces every leaf of `model` that has parameters, in place.

    Args:
        model: A causal language model whose parameters may lie on the meta device.
        context: What the leaves will read at each step.
        dtype: The dtype of the activations.

    Returns:
        The routed leaves, none of them bound to any slot.
    """
    leaves: list[RoutedLeaf] = []
    for name, module in list(model.named_modules()):
        if not list(module.named_parameters(recurse=False)):
            continue
        assert not list(module.children()), f"{name} has parameters and children"
        leaf = _routed(name, module, context, dtype)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, leaf)
        leaves.append(leaf)
    assert not list(model.parameters())
    return leaves


def _routed(name: str, module: nn.Module, context: StepContext, dtype: torch.dtype) -> RoutedLeaf:
    if isinstance(module, nn.Embedding):
        return RoutedEmbedding(name, module, context, dtype=dtype)
    kind: Callable[[str, nn.Module, StepContext], RoutedLeaf] = RoutedNorm
    if isinstance(module, nn.Linear):
        kind = RoutedHead if name == "lm_head" else RoutedLinear
    return kind(name, module, context)
