"""Launches of the kernels over compressed deltas: one for all matrices of a code.

What a launch is told of its matrices lies in a table on the device, which is made once for each set
of them: whatever changes from step to step is not in it.

Legend: J jobs, T rows of the batch, I input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from linker_core.engine.arithmetic import Addend, Code, code_of
from linker_core.engine.cuda.residual_kernels import expand_coded, multiply_coded
from linker_core.engine.uploads import upload
from linker_core.residency.coding import LEVELS, CodedMatrix

_TILE = {"BLOCK_N": 32, "BLOCK_K": 128}  # outputs and inputs of a product's tile
_EXPAND_TILE = {"BLOCK_N": 64, "BLOCK_K": 16}
_FEW_ROWS, _MANY_ROWS = 16, 64  # of a tile; 16 is a tensor core's least


class _Job(NamedTuple):
    matrix: CodedMatrix
    first_row: int  # of the call's list of rows
    num_rows: int
    out: torch.Tensor  # [T, …]; its memory is a part of the launch's y
    first_rank: int  # column of t
    rank: int


class ResidualLaunches:
    """Launches, and the tables that they were given before."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, ...], torch.Tensor] = {}
        self._levels: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def forget(self) -> None:
        """Drops every table."""
        self._tables.clear()

    def add(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        """See `Arithmetic.add_residuals`."""
        rows = torch.cat([addend.rows.indices_n for addend in addends])
        ranks = [0 if one.residual.down is None else one.residual.down.num_rows for one in addends]
        t_TR = x_TI.new_empty(len(x_TI), sum(ranks), dtype=torch.float32)
        products: dict[Code, list[_Job]] = {}
        inner: dict[Code, list[_Job]] = {}
        expansions: dict[Code, list[_Job]] = {}
        first_row = first_rank = 0
        for (residual, group, y_TO), rank in zip(addends, ranks, strict=True):
            t_Tr = t_TR[:, first_rank : first_rank + rank]
            for jobs_of, matrix, out in (
                (products, residual.dense, y_TO),
                (inner, residual.down, t_Tr),
                (expansions, residual.up, y_TO),
            ):
                if matrix is not None:
                    place = (first_row, len(group.indices_n), out, first_rank, rank)
                    jobs_of.setdefault(code_of(matrix), []).append(_Job(matrix, *place))
            first_row += len(group.indices_n)
            first_rank += rank
        for code, jobs in products.items():
            self._multiply(code, x_TI, rows, jobs, adds=True)
        for code, jobs in inner.items():
            self._multiply(code, x_TI, rows, jobs, adds=False)
        for code, jobs in expansions.items():
            self._expand(code, t_TR, rows, jobs)

    def _multiply(
        self,
        code: Code,
        x_TI: torch.Tensor,
        rows: torch.Tensor,
        jobs: Sequence[_Job],
        *,
        adds: bool,
    ) -> None:
        base = jobs[0].out
        multiply_coded[_grid(jobs, _TILE["BLOCK_N"])](
            *(x_TI, x_TI.stride(0), base, rows, self._table(jobs)),
            *(self._levels_of(code, x_TI.device), x_TI.shape[1]),
            ADDS=adds,
            **_constants(code, jobs),
            **_TILE,
        )

    def _expand(
        self, code: Code, t_TR: torch.Tensor, rows: torch.Tensor, jobs: Sequence[_Job]
    ) -> None:
        base = jobs[0].out
        expand_coded[_grid(jobs, _EXPAND_TILE["BLOCK_N"])](
            *(t_TR, t_TR.stride(0), base, rows, self._table(jobs)),
            self._levels_of(code, t_TR.device),
            **_constants(code, jobs),
            **_EXPAND_TILE,
        )

    def _table(self, jobs: Sequence[_Job]) -> torch.Tensor:
        """Returns [J, 9]; outputs are told by where they lie from the first one on."""
        base = jobs[0].out
        numbers: list[int] = []
        for matrix, first_row, num_rows, out, first_rank, rank in jobs:
            assert out.dtype is base.dtype
            scales = matrix.scales_RG.data_ptr() if matrix.scales_RG.numel() else 0
            offset = (out.data_ptr() - base.data_ptr()) // base.element_size()
            numbers += (matrix.codes_RB.data_ptr(), scales, offset, out.stride(0), out.shape[1])
            numbers += (first_row, num_rows, first_rank, rank)
        key = tuple(numbers)
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = upload(np.array(numbers, np.int64), base.device)
        return found

    def _levels_of(self, code: Code, device: torch.device) -> torch.Tensor:
        found = self._levels.get(code.bits)
        if found is None:
            levels = np.array(LEVELS.get(code.bits, (0.0,)), np.float32)
            found = self._levels[code.bits] = upload(levels, device)
        return found


def _constants(code: Code, jobs: Sequence[_Job]) -> dict[str, object]:
    most = max(job.num_rows for job in jobs)
    return {
        "BITS": code.bits,
        "GROUP": code.group,
        "CODE_TYPE": tl.bfloat16 if code.bits == 16 else tl.uint8,
        "SCALE_TYPE": tl.bfloat16,
        "BLOCK_M": _FEW_ROWS if most <= _FEW_ROWS else _MANY_ROWS,
    }


def _grid(jobs: Sequence[_Job], block_n: int) -> tuple[int, int, int]:
    most_rows = max(job.num_rows for job in jobs)
    most_out = max(job.out.shape[1] for job in jobs)
    block_m = _FEW_ROWS if most_rows <= _FEW_ROWS else _MANY_ROWS
    return len(jobs), triton.cdiv(most_out, block_n), triton.cdiv(most_rows, block_m)
