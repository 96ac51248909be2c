"""Which slot each row of a step belongs to, and the step context that every routed leaf reads.

Rows are grouped once per step and per distinct partition of the slots: every leaf whose storages
fall into the same partition gets the same groups, so nothing is worked out again layer by layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from linker_core.engine.linear import LinearProduct

RowGroup = slice | torch.Tensor  # a run of rows, or their indices (LongTensor)
Item = TypeVar("Item", bound=Hashable)


class RowMap:
    """The slot of every row, and the groups of rows that share a storage.

    Args:
        slots: The slot of each row, in the order of the rows. Not empty.
        device: Where the index tensors are to lie.
    """

    def __init__(self, slots: Sequence[int], *, device: torch.device) -> None:
        assert slots
        self._device = device
        self.num_rows = len(slots)
        self.distinct: tuple[int, ...] = tuple(dict.fromkeys(slots))
        self._rows: dict[int, list[int]] = {slot: [] for slot in self.distinct}
        for row, slot in enumerate(slots):
            self._rows[slot].append(row)
        self._groups: dict[tuple[int, ...], tuple[RowGroup, ...]] = {}

    def groups(self, partition: tuple[int, ...]) -> tuple[RowGroup, ...]:
        """Returns the rows of each group of a partition.

        Args:
            partition: For each slot of `distinct`, the number of its group: 0, 1, … in the order of
                first appearance.
        """
        found = self._groups.get(partition)
        if found is None:
            found = self._build(partition)
            self._groups[partition] = found
        return found

    def _build(self, partition: tuple[int, ...]) -> tuple[RowGroup, ...]:
        members: list[list[int]] = [[] for _ in range(max(partition) + 1)]
        for slot, group in zip(self.distinct, partition, strict=True):
            members[group].extend(self._rows[slot])
        return tuple(self._as_group(sorted(rows)) for rows in members)

    def _as_group(self, rows: list[int]) -> RowGroup:
        if rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, dtype=torch.long, device=self._device)


def partition(items: Iterable[Item]) -> tuple[tuple[int, ...], list[Item]]:
    """Numbers items by first appearance: returns each one's number, and the distinct ones."""
    numbers: dict[Item, int] = {}
    labels = tuple(numbers.setdefault(item, len(numbers)) for item in items)
    return labels, list(numbers)


@dataclass(slots=True)
class StepContext:
    """What the leaves of one family need to know of the current step; the runner sets the maps.

    The head sees only the rows that need a token, so it has a map of its own.
    """

    linear: LinearProduct = field(default_factory=LinearProduct)
    body: RowMap | None = None
    head: RowMap | None = None


def take_rows(x_T: torch.Tensor, rows: RowGroup) -> torch.Tensor:
    """Returns the rows of a group: a view for a run, a copy otherwise."""
    return x_T[rows] if isinstance(rows, slice) else x_T.index_select(0, rows)


def put_rows(out_T: torch.Tensor, rows: RowGroup, value: torch.Tensor) -> None:
    """Writes the rows of a group in place."""
    if isinstance(rows, slice):
        out_T[rows] = value
    else:
        out_T.index_copy_(0, rows, value)
