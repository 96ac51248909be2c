"""The leaves with a row for every token: the embedding and the head.

A variant may hold only the rows that are not its donor's, or a delta. Then the donor's table serves
it together with everybody else on that storage; what the variant's own rows give is written over
that, and what its delta gives is added.

Legend: T rows of the batch, H hidden size, V widest vocabulary among them, n own rows of a variant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.func import functional_call

from linker_core.engine.arithmetic import Addend, Arithmetic, Product
from linker_core.engine.leaf import RoutedLeaf, Tensors
from linker_core.engine.rows import RowGroup, RowMap, StepContext, partition
from linker_core.residency.delta_rows import Picked, delta_rows
from linker_core.residency.stored import Stored, StoredResidual, StoredRows, StoredTensor

_Split = StoredRows | StoredResidual  # a table that is partly its donor's


class RoutedTable(RoutedLeaf):
    """A leaf with one weight of which a variant may hold rows of its own, or a delta."""

    def __init__(self, name: str, original: nn.Module, context: StepContext) -> None:
        super().__init__(name, original, context)
        assert self.parameter_names == ("weight",)
        self._tables: dict[int, Stored] = {}

    def bind(self, slot: int, tensors: Tensors) -> None:
        weight_name = f"{self.leaf_name}.weight"
        table = tensors[weight_name]
        super().bind(slot, {weight_name: table.base})
        self._tables[slot] = table

    def unbind(self, slot: int) -> None:
        super().unbind(slot)
        del self._tables[slot]

    def tables(self, rows: RowMap) -> list[Stored]:
        """Returns what serves each distinct slot."""
        return [self._tables[slot] for slot in rows.distinct]


class RoutedEmbedding(RoutedTable):
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
        gathered_TH = look_up(ids_T, rows, self.tables(rows), dtype=self._dtype)
        local_T = torch.arange(len(ids_T), device=ids_T.device)
        out: torch.Tensor = functional_call(self._template[0], {"weight": gathered_TH}, (local_T,))
        return out.unsqueeze(0)


class RoutedHead(RoutedTable):
    """The language-model head: sees only the rows that need a token.

    Its output is as wide as the widest vocabulary among them; a row is valid up to its own
    variant's width and zero beyond.
    """

    def forward(self, x_1TH: torch.Tensor) -> torch.Tensor:
        """Returns [1, rows that need a token, widest vocabulary]."""
        rows = self.context.head
        assert rows is not None, "a routed model runs only inside a step"
        y_TV = project(x_1TH[0], rows, self.tables(rows), arithmetic=self.context.arithmetic)
        return y_TV.unsqueeze(0)


def look_up(
    ids_T: torch.Tensor, rows: RowMap, tables: Sequence[Stored], *, dtype: torch.dtype
) -> torch.Tensor:
    """Gathers the rows of token ids.

    Args:
        ids_T: Each lies below the number of rows of its own slot's table.
        rows: The slot of each row of the batch.
        tables: For each slot of `rows.distinct`.
        dtype: Of the result.

    Returns:
        [T, H], memory of its own.
    """
    labels, bases = partition(table.base for table in tables)
    # An added token lies beyond the donor's rows; what is gathered in its place is written over.
    beyond = any(table.num_rows > table.base.num_rows for table in tables)

    def gather(base: StoredTensor, part_T: torch.Tensor) -> torch.Tensor:
        inside_T = part_T.clamp(max=base.num_rows - 1) if beyond else part_T
        return base.tensor.index_select(0, inside_T).to(dtype)

    if len(bases) == 1:
        out_TH = gather(bases[0], ids_T)
    else:
        hidden = bases[0].tensor.shape[1]
        out_TH = torch.empty(len(ids_T), hidden, dtype=dtype, device=ids_T.device)
        for group, base in zip(rows.groups(labels), bases, strict=True):
            group.put(out_TH, gather(base, group.take(ids_T)))
    deltas: list[tuple[RowGroup, StoredResidual]] = []
    for group, table in _split_tables(rows, tables):
        if isinstance(table, StoredResidual):
            deltas.append((group, table))
        else:
            group.put(out_TH, _with_own(table, group.take(ids_T), group.take(out_TH)))
    if deltas:
        _add_deltas(deltas, ids_T, out_TH)
    return out_TH


def project(
    x_TH: torch.Tensor, rows: RowMap, tables: Sequence[Stored], *, arithmetic: Arithmetic
) -> torch.Tensor:
    """Multiplies with every row of the tables: one product for each distinct donor's table.

    Args:
        x_TH: The activations.
        rows: The slot of each row of the batch.
        tables: For each slot of `rows.distinct`.
        arithmetic: Computes the products.

    Returns:
        [T, V]; a row is valid up to its own table's number of rows and zero beyond.
    """
    labels, bases = partition(table.base for table in tables)
    num_columns = max(table.num_rows for table in tables)
    widths = [_needed_rows(base, tables) for base in bases]
    blank = x_TH.new_empty if set(widths) == {num_columns} else x_TH.new_zeros
    y_TV = blank(len(x_TH), num_columns)
    for group, base, width in zip(rows.groups(labels), bases, widths, strict=True):
        product = Product(base.tensor[:width], y_TV[:, :width], None)
        arithmetic.multiply(x_TH, group, [product])
    split = list(_split_tables(rows, tables))
    addends = [
        Addend(table, group, y_TV[:, : table.num_coded])
        for group, table in split
        if isinstance(table, StoredResidual)
    ]
    if addends:
        arithmetic.add_residuals(x_TH, addends)
    for group, table in split:
        _put_own(x_TH, group, table, y_TV, arithmetic)
        if table.num_rows < num_columns:  # the donor's further rows are no tokens of this one
            y_TV[:, table.num_rows :].index_fill_(0, group.indices_n, 0.0)
    return y_TV


def _put_own(
    x_TH: torch.Tensor, group: RowGroup, table: _Split, y_TV: torch.Tensor, arithmetic: Arithmetic
) -> None:
    """Writes what rows that a table holds whole give."""
    if isinstance(table, StoredResidual):
        if table.extra.shape[0]:
            y_Tn = y_TV[:, table.num_coded : table.num_rows]
            arithmetic.multiply(x_TH, group, [Product(table.extra, y_Tn, None)])
    elif len(table.own):
        own_Tn = x_TH.new_empty(len(x_TH), len(table.own))
        arithmetic.multiply(x_TH, group, [Product(table.own, own_Tn, None)])
        y_TV[group.indices_n.unsqueeze(1), table.positions] = group.take(own_Tn)


def _needed_rows(base: StoredTensor, tables: Sequence[Stored]) -> int:
    """How many of a table's rows somebody has a token for."""
    return min(base.num_rows, max(table.num_rows for table in tables if table.base is base))


def _split_tables(rows: RowMap, tables: Sequence[Stored]) -> Iterator[tuple[RowGroup, _Split]]:
    """Yields each table that is partly its donor's, with the batch's rows that it serves."""
    labels, distinct = partition(tables)
    for group, table in zip(rows.groups(labels), distinct, strict=True):
        if not isinstance(table, StoredTensor):
            yield group, table


def _add_deltas(
    deltas: Sequence[tuple[RowGroup, StoredResidual]], ids_T: torch.Tensor, out_TH: torch.Tensor
) -> None:
    """Adds rows of deltas to the donors' rows, or writes those of tokens that a donor lacks."""
    indices_n = torch.cat([group.indices_n for group, _ in deltas])
    counts = [group.indices_n.shape[0] for group, _ in deltas]
    ids = torch.split_with_sizes(ids_T.index_select(0, indices_n), counts)
    picked = []
    for (_, table), ids_n in zip(deltas, ids, strict=True):
        last = table.num_coded - 1
        picked.append(Picked(table, ids_n.clamp(max=last) if table.extra.shape[0] else ids_n))
    whole_nH = out_TH.index_select(0, indices_n).float() + delta_rows(picked)
    out_TH.index_copy_(0, indices_n, whole_nH.to(out_TH.dtype))
    for (group, table), ids_n in zip(deltas, ids, strict=True):
        if table.extra.shape[0]:
            beyond_n = ids_n - table.num_coded
            own_nH = table.extra.index_select(0, beyond_n.clamp(min=0)).to(out_TH.dtype)
            is_own_n1 = (beyond_n >= 0).unsqueeze(1)
            group.put(out_TH, torch.where(is_own_n1, own_nH, group.take(out_TH)))


def _with_own(table: StoredRows, ids_T: torch.Tensor, base_TH: torch.Tensor) -> torch.Tensor:
    """Returns the own rows of those ids that have one, `base_TH` elsewhere."""
    if not len(table.own):
        return base_TH
    nearest_T = torch.searchsorted(table.positions, ids_T).clamp_(max=len(table.own) - 1)
    is_own_T1 = (table.positions[nearest_T] == ids_T).unsqueeze(1)
    own_TH = table.own.index_select(0, nearest_T).to(base_TH.dtype)
    return torch.where(is_own_T1, own_TH, base_TH)
