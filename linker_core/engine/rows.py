"""Which slot each row of a step belongs to, and the step context that every routed leaf reads.

Rows are grouped once per step and per distinct partition of the slots: every leaf whose storages
fall into the same partition gets the same groups, so nothing is worked out again layer by layer.

Legend: T rows of the batch, n rows of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch

from linker_core.engine.uploads import upload

if TYPE_CHECKING:
    from linker_core.engine.arithmetic import Arithmetic

Item = TypeVar("Item", bound=Hashable)
Labels = tuple[int, ...]  # for each distinct slot the number of its group, by first appearance


class RowGroup(NamedTuple):
    """Some rows of a batch, ascending."""

    indices_n: torch.Tensor  # int64
    run: slice | None  # the same rows, where they are consecutive

    def take(self, x_T: torch.Tensor) -> torch.Tensor:
        """Returns these rows: a view for a run, a copy otherwise."""
        return x_T[self.run] if self.run is not None else x_T.index_select(0, self.indices_n)

    def put(self, out_T: torch.Tensor, value_n: torch.Tensor) -> None:
        """Writes these rows in place."""
        if self.run is not None:
            out_T[self.run] = value_n
        else:
            out_T.index_copy_(0, self.indices_n, value_n)


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
        numbers = {slot: number for number, slot in enumerate(self.distinct)}
        # Of each row, the place of its slot among the distinct ones.
        self._numbers_T = np.fromiter((numbers[slot] for slot in slots), np.int64, len(slots))
        self.whole = RowGroup(torch.arange(len(slots), device=device), slice(0, len(slots)))
        self._groups: dict[Labels, tuple[RowGroup, ...]] = {}
        self._labels_T: dict[Labels, torch.Tensor] = {}

    def groups(self, labels: Labels) -> tuple[RowGroup, ...]:
        """Returns the rows of each group, by its number."""
        found = self._groups.get(labels)
        if found is None:
            found = self._groups[labels] = self._build(labels)
        return found

    def labels(self, labels: Labels) -> torch.Tensor:
        """Returns the number of every row's group, int64 [T]."""
        found = self._labels_T.get(labels)
        if found is None:
            numbers_T = np.asarray(labels, np.int64)[self._numbers_T]
            found = self._labels_T[labels] = upload(numbers_T, self._device)
        return found

    def _build(self, labels: Labels) -> tuple[RowGroup, ...]:
        num_groups = max(labels) + 1
        if num_groups == 1:
            return (self.whole,)
        of_row_T = np.asarray(labels)[self._numbers_T]
        return tuple(self._group(np.flatnonzero(of_row_T == g)) for g in range(num_groups))

    def _group(self, rows_n: np.ndarray) -> RowGroup:
        first, last = int(rows_n[0]), int(rows_n[-1])
        run = slice(first, last + 1) if last - first + 1 == len(rows_n) else None
        return RowGroup(upload(rows_n, self._device), run)


def partition(items: Iterable[Item]) -> tuple[Labels, list[Item]]:
    """Numbers items by first appearance: returns each one's number, and the distinct ones."""
    numbers: dict[Item, int] = {}
    labels = tuple(numbers.setdefault(item, len(numbers)) for item in items)
    return labels, list(numbers)


@dataclass(slots=True)
class StepContext:
    """What the leaves of one family need to know of the current step; the runner sets the maps.

    The head sees only the rows that need a token, so it has a map of its own.
    """

    arithmetic: Arithmetic
    body: RowMap | None = None
    head: RowMap | None = None
    # Shown every product of a block: the weight's name, its input rows and its output rows.
    watch: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None
