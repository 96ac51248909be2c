"""RoutedLeaf: the leaves of a Hugging Face model, each serving many variants from many storages.

A leaf knows, per slot, which stored tensors serve it, and groups the rows of a batch by storage:
variants that alias one storage fall into one product. Nothing else in the model knows of variants.

Legend: T rows of the batch, I input features, O output features, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call

from linker_core.engine.rows import RowMap, StepContext, put_rows, take_rows
from linker_core.residency.ledger import StoredTensor

Tensors = Mapping[str, StoredTensor]


class RoutedLeaf(nn.Module):
    """A leaf whose parameters are looked up by slot.

    Args:
        name: Dotted name of the original leaf, such as `model.layers.0.self_attn.q_proj`.
        original: The leaf that is replaced; its parameters are never read.
        context: The family's step context.
    """

    def __init__(self, name: str, original: nn.Module, context: StepContext) -> None:
        super().__init__()
        self.leaf_name = name
        self.context = context
        self.parameter_names = tuple(key for key, _ in original.named_parameters(recurse=False))
        self.stored: dict[int, dict[str, StoredTensor]] = {}

    def bind(self, slot: int, tensors: Tensors) -> None:
        """Lets `slot` be served by its storages among `tensors` (by checkpoint name)."""
        assert slot not in self.stored
        self.stored[slot] = {
            key: tensors[f"{self.leaf_name}.{key}"] for key in self.parameter_names
        }

    def unbind(self, slot: int) -> None:
        """Forgets `slot` and every storage that only it used."""
        del self.stored[slot]

    def partition(self, rows: RowMap, key: str) -> tuple[tuple[int, ...], list[StoredTensor]]:
        """Returns each distinct slot's group by its storage of `key`, and each group's storage."""
        storages: dict[StoredTensor, int] = {}
        labels = tuple(
            storages.setdefault(self.stored[slot][key], len(storages)) for slot in rows.distinct
        )
        return labels, list(storages)

    def _body(self) -> RowMap:
        assert self.context.body is not None, "a routed model runs only inside a step"
        return self.context.body


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
        widths = [weight.tensor.shape[0] for weight in weights]
        # Only heads differ in width (added tokens); what a narrow row does not have stays zero.
        blank = x_TI.new_empty if len(set(widths)) == 1 else x_TI.new_zeros
        y_TO = blank(x_TI.shape[0], max(widths))
        for index, group in enumerate(rows.groups(labels)):
            put_rows(y_TO[:, : widths[index]], group, product(take_rows(x_TI, group), index))
        return y_TO


class RoutedHead(RoutedLinear):
    """The language-model head: sees only the rows that need a token.

    Its output is as wide as the widest vocabulary among them; a row is valid up to its own
    variant's width and zero beyond.
    """

    def forward(self, x_1TI: torch.Tensor) -> torch.Tensor:
        """Returns [1, rows that need a token, widest vocabulary]."""
        rows = self.context.head
        assert rows is not None, "a routed model runs only inside a step"
        return self._product(x_1TI[0], rows).unsqueeze(0)


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


class RoutedEmbedding(RoutedLeaf):
    """The token embedding: rows gathered by storage, then the original leaf over the gathered rows.

    Args:
        name: Dotted name of the original leaf.
        original: The embedding that is replaced; a scale that it applies is kept.
        context: The family's step context.
        dtype: The dtype of the activations; gathered rows are widened to it before any scale.
    """

    def __init__(
        self, name: str, original: nn.Embedding, context: StepContext, *, dtype: torch.dtype
    ) -> None:
        super().__init__(name, original, context)
        assert original.padding_idx is None  # it would be read as an index into gathered rows
        self._template = (original,)
        self._dtype = dtype

    def forward(self, ids_1T: torch.Tensor) -> torch.Tensor:
        """Returns [1, T, H] for token ids [1, T]; each id lies below its own variant's width."""
        ids_T, rows = ids_1T[0], self._body()
        labels, weights = self.partition(rows, "weight")
        if len(weights) == 1:
            gathered_TH = weights[0].tensor.index_select(0, ids_T).to(self._dtype)
        else:
            width = weights[0].tensor.shape[1]
            gathered_TH = torch.empty(len(ids_T), width, dtype=self._dtype, device=ids_T.device)
            for group, weight in zip(rows.groups(labels), weights, strict=True):
                words = weight.tensor.index_select(0, take_rows(ids_T, group))
                put_rows(gathered_TH, group, words.to(self._dtype))
        local_T = torch.arange(len(ids_T), device=ids_T.device)
        out: torch.Tensor = functional_call(self._template[0], {"weight": gathered_TH}, (local_T,))
        return out.unsqueeze(0)


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
