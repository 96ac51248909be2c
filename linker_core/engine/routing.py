"""The leaves of a Hugging Face model's blocks, each serving many variants from many storages.

Rows of a batch are grouped by storage: variants that alias one storage fall into one product, and
so do those that hold a delta to it, which is then added on their own rows.

Legend: T rows of the batch, I input features, O output features, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from linker_core.engine.arithmetic import Addend, ByRow, Norm, Product
from linker_core.engine.leaf import Partition, RoutedLeaf, Tensors
from linker_core.engine.rows import Labels, RowMap, StepContext, partition
from linker_core.residency.stored import Stored, StoredResidual


class RoutedLinear(RoutedLeaf):
    """A linear layer: one product for each distinct weight among the rows, and deltas to it."""

    def __init__(self, name: str, original: nn.Linear, context: StepContext) -> None:
        super().__init__(name, original, context)
        self.num_out = original.out_features
        self._residuals: dict[int, StoredResidual] = {}

    def bind(self, slot: int, tensors: Tensors) -> None:
        weight_name = f"{self.leaf_name}.weight"
        weight = tensors[weight_name]
        if not isinstance(weight, StoredResidual):
            super().bind(slot, tensors)
            return
        assert weight.num_rows == self.num_out
        assert not len(weight.extra)
        super().bind(slot, {**tensors, weight_name: weight.base})
        self._residuals[slot] = weight

    def unbind(self, slot: int) -> None:
        super().unbind(slot)
        self._residuals.pop(slot, None)

    def kind(self, slot: int) -> tuple[Stored, ...]:
        residual = self._residuals.get(slot)
        return (*super().kind(slot), *(() if residual is None else (residual,)))

    def addends(self, rows: RowMap, y_TO: torch.Tensor) -> list[Addend]:
        """Returns what is to be added to the products of some rows.

        Args:
            rows: Of the batch.
            y_TO: The leaf's outputs.
        """
        if not self._residuals:
            return []
        labels, residuals = partition(map(self._residuals.get, rows.distinct))
        return [
            Addend(residual, group, y_TO)
            for residual, group in zip(residuals, rows.groups(labels), strict=True)
            if residual is not None
        ]

    def forward(self, x_TI: torch.Tensor, out: str) -> torch.Tensor:
        """Returns [T, O], in the buffer that `out` names."""
        y_TO = self.context.arithmetic.buffer(out, x_TI.shape[0], self.num_out, x_TI)
        multiply([self], x_TI, [y_TO], self.context)
        return y_TO


class RoutedNorm(RoutedLeaf):
    """A root-mean-square norm, with every row's own weight."""

    def __init__(self, name: str, original: nn.Module, context: StepContext, norm: Norm) -> None:
        super().__init__(name, original, context)
        assert self.parameter_names == ("weight",)
        self._norm = norm

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Returns the normalised rows [T, H], in a buffer of the norms."""
        out_TH = self.context.arithmetic.buffer("normed", x_TH.shape[0], x_TH.shape[1], x_TH)
        self.normalize(x_TH, out_TH)
        return out_TH

    def normalize(self, x_TX: torch.Tensor, out_TX: torch.Tensor) -> None:
        """Normalises every run of as many elements of a row as the weight has."""
        rows = self._body()
        weights = _by_row(self.partition(rows, "weight"), rows)
        self.context.arithmetic.normalize(x_TX, weights, self._norm, out_TX)


def multiply(
    leaves: Sequence[RoutedLinear],
    x_TI: torch.Tensor,
    outs: Sequence[torch.Tensor],
    context: StepContext,
) -> None:
    """Computes several leaves of the same rows.

    Args:
        leaves: Which.
        x_TI: The rows.
        outs: [T, O] of each leaf.
        context: The step.
    """
    rows = context.body
    assert rows is not None, "a routed model runs only inside a step"
    together: dict[Labels, list[tuple[Partition, ByRow | None, torch.Tensor]]] = {}
    for leaf, y_TO in zip(leaves, outs, strict=True):
        weights = leaf.partition(rows, "weight")
        bias = None
        if "bias" in leaf.parameter_names:
            bias = _by_row(leaf.partition(rows, "bias"), rows)
        together.setdefault(weights.labels, []).append((weights, bias, y_TO))
    for labels, parts in together.items():
        for number, group in enumerate(rows.groups(labels)):
            products = [Product(weights.tensors[number], y, bias) for weights, bias, y in parts]
            context.arithmetic.multiply(x_TI, group, products)
    addends = [
        addend
        for leaf, y_TO in zip(leaves, outs, strict=True)
        for addend in leaf.addends(rows, y_TO)
    ]
    if addends:
        context.arithmetic.add_residuals(x_TI, addends)
    if context.watch is not None:
        for leaf, y_TO in zip(leaves, outs, strict=True):
            context.watch(f"{leaf.leaf_name}.weight", x_TI, y_TO)


def _by_row(found: Partition, rows: RowMap) -> ByRow:
    if len(found.tensors) == 1:
        return ByRow(found.tensors, None)
    return ByRow(found.tensors, rows.labels(found.labels))
