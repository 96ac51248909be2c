"""Rows of the deltas of many variants at once: what an embedding looks up in a step.

Legend: n rows, of all variants one behind the other; v variants, r rank, I width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from linker_core.residency.coding import CodedMatrix
from linker_core.residency.stored import StoredResidual


class Picked(NamedTuple):
    """Rows of one delta."""

    residual: StoredResidual
    rows: torch.Tensor  # indices below its `num_coded`, int64


class _Dense(NamedTuple):
    """Rows of one coded matrix, and where they go."""

    matrix: CodedMatrix
    rows: torch.Tensor
    places: slice


class _LowRank(NamedTuple):
    """Rows of one product of factors, and where they go."""

    down: CodedMatrix
    up: CodedMatrix
    rows: torch.Tensor
    places: slice


def delta_rows(picked: Sequence[Picked]) -> torch.Tensor:
    """Returns the rows as `StoredResidual.delta` gives them, float32 [n, I].

    A row's are the same whatever is picked beside it.

    Args:
        picked: In the order of the result; of deltas of one width. Not empty.
    """
    coded: dict[Hashable, list[_Dense]] = {}
    factored: dict[Hashable, list[_LowRank]] = {}
    first = 0
    for residual, rows in picked:
        places = slice(first, first := first + rows.shape[0])
        dense, down, up = residual.dense, residual.down, residual.up
        if dense is not None:
            code = (dense.bits, dense.group)
            coded.setdefault(code, []).append(_Dense(dense, rows, places))
        if down is not None and up is not None:
            factored.setdefault(down.num_rows, []).append(_LowRank(down, up, rows, places))
    width = picked[0].residual.extra.shape[1]
    out_nI = torch.zeros(first, width, device=picked[0].rows.device)
    for parts in coded.values():
        _spread(_decoded(parts), [part.places for part in parts], out_nI)
    for factors in factored.values():
        _spread(_products(factors), [part.places for part in factors], out_nI)
    return out_nI


def _decoded(parts: Sequence[_Dense]) -> torch.Tensor:
    """Returns rows of matrices of one code, which are decoded together."""
    codes = [part.matrix.codes_RB.index_select(0, part.rows) for part in parts]
    scales = [part.matrix.scales_RG.index_select(0, part.rows) for part in parts]
    gathered = replace(parts[0].matrix, codes_RB=torch.cat(codes), scales_RG=torch.cat(scales))
    return gathered.decoded()


def _products(factors: Sequence[_LowRank]) -> torch.Tensor:
    """Returns rows of upᵀ down of one rank, each summed in the order of the rank."""
    up_rn = torch.cat([part.up.columns(part.rows) for part in factors], dim=1).unsqueeze(2)
    down_rvI = torch.stack([part.down.decoded() for part in factors], dim=1)
    counts = [part.rows.shape[0] for part in factors]
    numbers = torch.arange(len(factors), device=up_rn.device)
    of_row = torch.repeat_interleave(
        numbers, torch.tensor(counts, device=up_rn.device), output_size=sum(counts)
    )
    alone = len(factors) == 1  # then its row of the factor serves all, without a copy for each
    product_nI = up_rn[0] * down_rvI[0].index_select(0, of_row)
    term_nI = torch.empty_like(product_nI)
    for up_n1, down_vI in zip(up_rn[1:], down_rvI[1:], strict=True):
        torch.mul(up_n1, down_vI if alone else down_vI.index_select(0, of_row), out=term_nI)
        product_nI += term_nI
    return product_nI


def _spread(rows_nI: torch.Tensor, places: Sequence[slice], out_nI: torch.Tensor) -> None:
    """Adds consecutive runs of rows to their places."""
    if rows_nI.shape == out_nI.shape:
        out_nI += rows_nI
        return
    first = 0
    for place in places:
        count = place.stop - place.start
        out_nI[place] += rows_nI[first : first + count]
        first += count
