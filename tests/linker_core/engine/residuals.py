"""Compressed deltas made up of random codes, and what they add in float64.

Legend: R rows, W width of a coded matrix; O rows, I width of a weight; T rows of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from linker_core.engine.arithmetic import Addend
from linker_core.residency.coding import CodedMatrix, pack_codes
from linker_core.residency.stored import StoredResidual, StoredTensor
from linker_core.sharing.rungs import (
    Residual,
    code_row_bytes,
    factor_group,
    num_groups,
    parse_rung,
)


def coded(rows: int, width: int, *, bits: int, group: int, seed: int) -> CodedMatrix:
    """Returns a matrix of any codes, with anything where codes are padding."""
    generator = torch.Generator().manual_seed(seed)
    groups = 0 if bits == 16 else num_groups(width, group)
    scales_RG = torch.rand(rows, groups, generator=generator).add_(0.1)
    row_bytes = code_row_bytes(width, bits)
    codes_RB = torch.randint(256, (rows, row_bytes), dtype=torch.uint8, generator=generator)
    if bits == 16:
        words_RW = torch.randn(rows, width, generator=generator).bfloat16()
        codes_RB = words_RW.view(torch.uint8)
    elif bits == 8:
        scales_RG /= 64
    else:
        shape = (rows, row_bytes * 8 // bits)
        codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=generator)
        codes_RB = pack_codes(codes, bits)
    return CodedMatrix(
        bits=bits,
        group=width if bits == 16 else group,
        width=width,
        codes_RB=codes_RB,
        scales_RG=scales_RG.bfloat16(),
    )


def residual(text: str, num_out: int, width: int, *, seed: int = 0) -> StoredResidual:
    """Returns a delta [O, I] on the rung that `text` names; the donor's weight is zeros."""
    rung = parse_rung(text)
    assert isinstance(rung, Residual)
    dense = down = up = None
    if rung.bits:
        dense = coded(num_out, width, bits=rung.bits, group=rung.group, seed=seed)
    if rung.rank:
        down, up = (
            coded(
                rung.rank,
                length,
                bits=rung.factor_bits,
                group=factor_group(length, rung.factor_bits),
                seed=seed + number,
            )
            for number, length in ((1, width), (2, num_out))
        )
    return StoredResidual(
        base=StoredTensor(tensor=torch.zeros(num_out, width, dtype=torch.bfloat16)),
        dense=dense,
        down=down,
        up=up,
        extra=torch.empty(0, width, dtype=torch.bfloat16),
    )


def assert_added(
    x_TI: torch.Tensor, addends: Sequence[Addend], before: Sequence[torch.Tensor]
) -> None:
    """Checks every addend's rows against float64, and that its other rows are as before.

    Args:
        x_TI: What was multiplied.
        addends: With what they became.
        before: What they added to, a copy for each.
    """
    for addend, y_TO in zip(addends, before, strict=True):
        rows = addend.rows.indices_n
        delta_OI = addend.residual.delta().double()
        added_nO = x_TI[rows].double() @ delta_OI.T
        want_TO = y_TO.double()
        want_TO[rows] += added_nO
        others = torch.ones(len(y_TO), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(addend.y_TO[others], y_TO[others])
        # Of the terms' sizes: a sum that cancels is no less exact than one that does not.
        terms_nO = x_TI[rows].double().abs() @ _sizes(addend.residual).T
        off = (addend.y_TO[rows].double() - want_TO[rows]).abs()
        assert float((off / (terms_nO + y_TO[rows].abs())).max()) <= 1e-5


def _sizes(residual: StoredResidual) -> torch.Tensor:
    """Returns what the delta would be if all of its terms were positive, float64 [O, I]."""
    sizes_OI = torch.zeros(residual.num_rows, residual.extra.shape[1], dtype=torch.float64)
    if residual.dense is not None:
        sizes_OI += residual.dense.decoded().abs()
    if residual.down is not None and residual.up is not None:
        sizes_OI += residual.up.decoded().double().abs().T @ residual.down.decoded().double().abs()
    return sizes_OI
