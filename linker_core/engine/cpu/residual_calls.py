"""The records of products with compressed deltas: which regions run over which jobs.

Matrices of one code are one region's, however many variants and leaves they are of. What the low
rank's first factor gives lies in room of its own until the second takes it.

Legend: T rows of x, I input features, O output features, R rank.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from linker_core.engine.arithmetic import Addend, Code, code_of
from linker_core.engine.cpu import coded_product_code, expand_code
from linker_core.engine.cpu.jobs import NEVER
from linker_core.engine.cpu.kernels import coded_product_region, expand_region
from linker_core.engine.cpu.regions import Region
from linker_core.engine.rows import RowGroup
from linker_core.residency.coding import CodedMatrix

_PRODUCT_COUNTER = coded_product_code.TASK.index("next_piece")
_EXPAND_COUNTER = expand_code.TASK.index("next_piece")


class ResidualCall(NamedTuple):
    """A region over a record."""

    region: Region
    task: tuple[int, ...]
    counter: int
    work: int  # multiplications
    kept: tuple[object, ...]  # what lies behind the record's addresses, weights and y apart


class _Coded(NamedTuple):
    """y = x Dᵀ of some rows, or added to what is there."""

    matrix: CodedMatrix
    rows: RowGroup
    y_TO: torch.Tensor
    adds: bool


class _Expanded(NamedTuple):
    """y += t U of some rows."""

    t_TR: torch.Tensor
    matrix: CodedMatrix
    rows: RowGroup
    y_TO: torch.Tensor


class ResidualCalls:
    """Makes the calls of a batch of addends. Its room grows; what was recorded keeps the old.

    Args:
        rounded: Whether products round their rows to bfloat16, where the CPU can.
    """

    def __init__(self, *, rounded: bool) -> None:
        self._rounded = rounded
        self._packed = torch.empty(0)
        self._inner = torch.empty(0)

    def calls(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> Iterator[ResidualCall]:
        """Yields what adds the addends, in this order."""
        products: dict[Code, list[_Coded]] = {}
        sums: dict[Code, list[_Expanded]] = {}
        inner = self._inner_rooms(len(x_TI), addends)
        for residual, rows, y_TO in addends:
            if residual.dense is not None:
                job = _Coded(residual.dense, rows, y_TO, adds=True)
                products.setdefault(code_of(residual.dense), []).append(job)
            if residual.down is not None and residual.up is not None:
                t_TR = next(inner)
                job = _Coded(residual.down, rows, t_TR, adds=False)
                products.setdefault(code_of(residual.down), []).append(job)
                expanded = _Expanded(t_TR, residual.up, rows, y_TO)
                sums.setdefault(code_of(residual.up), []).append(expanded)
        all_rows = _union([addend.rows for addend in addends])
        for code, jobs in products.items():
            yield self._product(code, x_TI, all_rows, jobs)
        for code, expansions in sums.items():
            yield self._expansion(code, expansions)

    def _product(
        self, code: Code, x_TI: torch.Tensor, all_rows: np.ndarray, jobs: Sequence[_Coded]
    ) -> ResidualCall:
        num_rows, width = x_TI.shape
        unit = coded_product_code.PACKED_UNIT
        self._packed = _grown(self._packed, num_rows * -(-width // unit) * unit)
        records: list[int] = []
        num_pieces = work = 0
        for matrix, rows, y_TO, adds in jobs:
            assert matrix.width == width
            assert matrix.num_rows == y_TO.shape[1]
            assert y_TO.dtype is torch.float32
            of_job = len(rows.indices_n)
            records += (matrix.codes_RB.data_ptr(), matrix.scales_RG.data_ptr())
            records += (y_TO.data_ptr(), y_TO.stride(0), matrix.num_rows, num_pieces)
            records += (rows.indices_n.data_ptr(), of_job, int(adds))
            num_pieces += -(-matrix.num_rows // coded_product_code.PIECE_ROWS)
            work += of_job * matrix.num_rows * width
        words = _ended(records, coded_product_code.JOB)
        task = (
            *(x_TI.data_ptr(), x_TI.stride(0), width, self._packed.data_ptr()),
            *(all_rows.ctypes.data, len(all_rows), num_pieces, 0, words.buffer_info()[0]),
        )
        kept = (words, self._packed, self._inner, all_rows, *(job.rows.indices_n for job in jobs))
        region = coded_product_region(code, self._rounded)
        return ResidualCall(region, task, _PRODUCT_COUNTER, work, kept)

    def _expansion(self, code: Code, jobs: Sequence[_Expanded]) -> ResidualCall:
        records: list[int] = []
        num_pieces = work = 0
        for t_TR, matrix, rows, y_TO in jobs:
            assert matrix.width == y_TO.shape[1]
            assert matrix.num_rows == t_TR.shape[1]
            of_job = len(rows.indices_n)
            records += (matrix.codes_RB.data_ptr(), matrix.scales_RG.data_ptr())
            records += (matrix.num_rows, matrix.width, t_TR.data_ptr(), t_TR.stride(0))
            records += (y_TO.data_ptr(), y_TO.stride(0), rows.indices_n.data_ptr(), of_job)
            records.append(num_pieces)
            num_pieces += -(-matrix.width // expand_code.PIECE_COLUMNS)
            work += of_job * matrix.num_rows * matrix.width
        words = _ended(records, expand_code.JOB)
        task = (num_pieces, 0, words.buffer_info()[0])
        kept = (words, self._inner, *(job.rows.indices_n for job in jobs))
        return ResidualCall(expand_region(code), task, _EXPAND_COUNTER, work, kept)

    def _inner_rooms(self, num_rows: int, addends: Sequence[Addend]) -> Iterator[torch.Tensor]:
        """Yields room [T, R] for every addend that has factors."""
        ranks = [addend.residual.down.num_rows for addend in addends if addend.residual.down]
        self._inner = _grown(self._inner, num_rows * sum(ranks))
        firsts = accumulate((num_rows * rank for rank in ranks), initial=0)
        for first, rank in zip(firsts, ranks, strict=False):
            yield self._inner[first : first + num_rows * rank].view(num_rows, rank)


def _grown(room: torch.Tensor, num_elements: int) -> torch.Tensor:
    return room if room.numel() >= num_elements else torch.empty(num_elements)


def _ended(records: Sequence[int], names: tuple[str, ...]) -> array[int]:
    """Returns jobs behind one another, and a last record that ends them."""
    end = [NEVER if name == "first_piece" else 0 for name in names]
    return array("q", (*records, *end))


def _union(groups: Sequence[RowGroup]) -> np.ndarray:
    """Returns the rows that some group has."""
    if len(groups) == 1:
        return groups[0].indices_n.numpy()
    return np.unique(np.concatenate([group.indices_n.numpy() for group in groups]))
