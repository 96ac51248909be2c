"""RoutedLeaf: a leaf of a Hugging Face model that serves many variants from many storages.

It knows, per slot, what is stored for it. Nothing else in the model knows of variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from linker_core.engine.rows import Labels, RowMap, StepContext, partition
from linker_core.residency.stored import Stored, StoredTensor

Tensors = Mapping[str, Stored]

_MAX_PARTITIONS = 64  # of sets of slots that meet in a batch; then they are worked out anew


class Partition(NamedTuple):
    """Which of a few storages serves each slot of a batch."""

    labels: Labels
    tensors: tuple[torch.Tensor, ...]  # by label


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
        self._partitions: dict[tuple[str, tuple[int, ...]], Partition] = {}

    def bind(self, slot: int, tensors: Tensors) -> None:
        """Lets `slot` be served by its storages among `tensors` (by checkpoint name)."""
        assert slot not in self.stored
        found: dict[str, StoredTensor] = {}
        for key in self.parameter_names:
            entry = tensors[f"{self.leaf_name}.{key}"]
            assert isinstance(entry, StoredTensor), "only matrices are held in part"
            found[key] = entry
        self.stored[slot] = found
        self._partitions.clear()

    def unbind(self, slot: int) -> None:
        """Forgets `slot` and every storage that only it used."""
        del self.stored[slot]
        self._partitions.clear()

    def kind(self, slot: int) -> tuple[Stored, ...]:
        """Returns all that is stored for a slot; slots of equal kinds are computed alike."""
        return tuple(self.stored[slot].values())

    def partition(self, rows: RowMap, key: str) -> Partition:
        """Returns each distinct slot's group by its storage of `key`, and each group's tensor."""
        found = self._partitions.get((key, rows.distinct))
        if found is None:
            labels, entries = partition(self.stored[slot][key] for slot in rows.distinct)
            found = Partition(labels, tuple(entry.tensor for entry in entries))
            if len(self._partitions) >= _MAX_PARTITIONS:
                self._partitions.clear()
            self._partitions[key, rows.distinct] = found
        return found

    def _body(self) -> RowMap:
        assert self.context.body is not None, "a routed model runs only inside a step"
        return self.context.body
