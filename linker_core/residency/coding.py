"""A matrix in few bits: codes that are looked up in a table, times a scale for each group of a row.

The form lies on the device and in delta files alike. Legend: R rows, W width, G groups of a row,
B bytes of a row's codes.

A row's codes come in runs of 128 weights. In a run the codes of b = 1, 2 or 4 bits lie in chunks of
16 bytes; byte l of a chunk has, from its low bits up, the codes of weights l, l + 16, l + 32, … of
the chunk. For 3 bits 32 bytes hold the low two bits as for b = 2 and 16 bytes the high bit as for
b = 1. 8-bit elements are integers, row after row, padded to a multiple of 16; 16-bit ones bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional as F

from linker_core.sharing.rungs import CODE_UNIT, code_row_bytes, num_groups

_LANES = 16  # bytes of a chunk
# What a code stands for, in units of its group's scale: where the squared error of a normal
# variable is least (Lloyd 1957, Max 1960), rounded to bfloat16, so that kernels of either type
# compute with the same weights. The rounding adds 0.02 % to that error at most.
LEVELS: Final = {
    1: (-1.0, 1.0),
    2: (-1.5078125, -0.453125, 0.453125, 1.5078125),
    3: (
        *(-2.15625, -1.34375, -0.7578125, -0.2451171875),
        *(0.2451171875, 0.7578125, 1.34375, 2.15625),
    ),
    4: (
        *(-2.734375, -2.0625, -1.6171875, -1.2578125),
        *(-0.94140625, -0.65625, -0.388671875, -0.1279296875),
        *(0.1279296875, 0.388671875, 0.65625, 0.94140625),
        *(1.2578125, 1.6171875, 2.0625, 2.734375),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodedMatrix:
    """[R, W] in codes. Scales are bfloat16; a row of 16-bit elements has none."""

    bits: int  # 1, 2, 3, 4, 8 or 16
    group: int  # elements of a row that share a scale
    width: int  # W
    codes_RB: torch.Tensor  # uint8, contiguous
    scales_RG: torch.Tensor  # bfloat16, contiguous; [R, 0] for 16 bits

    def __post_init__(self) -> None:
        groups = 0 if self.bits == 16 else num_groups(self.width, self.group)
        assert self.codes_RB.shape[1] == code_row_bytes(self.width, self.bits)
        assert self.scales_RG.shape == (len(self.codes_RB), groups)

    @property
    def num_rows(self) -> int:
        return self.codes_RB.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What lies on the device."""
        return (self.codes_RB, self.scales_RG)

    @property
    def nbytes(self) -> int:
        return self.codes_RB.nbytes + self.scales_RG.nbytes

    def decoded(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Returns rows, float32 [n, W]. A row's values depend on the row alone."""
        codes_nB, scales_nG = self.codes_RB[rows], self.scales_RG[rows].float()
        if self.bits == 16:
            return codes_nB.view(torch.bfloat16).float()
        if self.bits == 8:
            values_nW = codes_nB.view(torch.int8)[:, : self.width].float()
        else:
            levels = torch.tensor(LEVELS[self.bits], device=codes_nB.device)
            values_nW = levels[unpack_codes(codes_nB, self.bits)[:, : self.width].int()]
        return values_nW * scales_nG.repeat_interleave(self.group, dim=1)[:, : self.width]

    def columns(self, columns: torch.Tensor | slice) -> torch.Tensor:
        """Returns columns, float32 [R, n]; of indices int64 [n] no other codes are looked at."""
        if isinstance(columns, slice):
            return self.decoded()[:, columns]
        if self.bits == 16:
            return self.codes_RB.view(torch.bfloat16).index_select(1, columns).float()
        if self.bits == 8:
            values_Rn = self.codes_RB.view(torch.int8).index_select(1, columns).float()
        else:
            runs = self.codes_RB.view(self.num_rows, -1, CODE_UNIT * self.bits // 8)
            mine = runs.index_select(1, columns // CODE_UNIT)
            codes = unpack_codes(mine.flatten(0, 1), self.bits).view(*mine.shape[:2], CODE_UNIT)
            at = (columns % CODE_UNIT).view(1, -1, 1).expand(self.num_rows, -1, 1)
            levels = torch.tensor(LEVELS[self.bits], device=codes.device)
            values_Rn = levels[codes.gather(2, at).squeeze(2).int()]
        return values_Rn * self.scales_RG.index_select(1, columns // self.group).float()


def pack_codes(codes_RW: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns codes of 1 to 4 bits as they are stored, uint8 [R, B].

    Args:
        codes_RW: uint8, each below 2**bits.
        bits: Of a code.
    """
    rows, width = codes_RW.shape
    runs = F.pad(codes_RW, (0, -width % CODE_UNIT)).view(rows, -1, CODE_UNIT)
    if bits == 3:
        parts = [_packed(runs & 3, 2), _packed(runs >> 2, 1)]
        return torch.cat(parts, dim=2).flatten(1)
    return _packed(runs, bits).flatten(1)


def unpack_codes(codes_RB: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the codes of whole runs, uint8 [R, a multiple of 128]."""
    runs = codes_RB.view(len(codes_RB), -1, CODE_UNIT * bits // 8)
    if bits == 3:
        low, high = runs[:, :, : CODE_UNIT * 2 // 8], runs[:, :, CODE_UNIT * 2 // 8 :]
        return (_unpacked(low, 2) | (_unpacked(high, 1) << 2)).flatten(1)
    return _unpacked(runs, bits).flatten(1)


def _packed(runs: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, runs, 128] codes -> [R, runs, 16 · bits] bytes."""
    per_byte = 8 // bits
    parts = runs.view(*runs.shape[:2], -1, per_byte, _LANES)
    packed = parts[:, :, :, 0].clone()
    for place in range(1, per_byte):
        packed |= parts[:, :, :, place] << (place * bits)
    return packed.flatten(2)


def _unpacked(runs: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, runs, bytes] -> [R, runs, codes]."""
    chunks = runs.reshape(*runs.shape[:2], -1, 1, _LANES)
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=runs.device).view(1, 1, 1, -1, 1)
    codes: torch.Tensor = (chunks >> places) & (2**bits - 1)
    return codes.flatten(2)
