"""Rounds matrices to codes and scales: the scale of each group is where the squared error is least.

Legend: R rows, W width, G groups of a row, g elements of a group.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from linker_core.errors import BadCheckpointError
from linker_core.residency.coding import LEVELS, CodedMatrix, pack_codes
from linker_core.sharing.rungs import code_row_bytes, num_groups

_ROUNDS = 3  # of refitting a scale to the codes that it led to
_BYTE_LIMIT = 127  # an 8-bit element's magnitude
_SMALLEST = torch.finfo(torch.float32).tiny  # divides where a scale is 0


def rounded(values_RW: torch.Tensor, *, bits: int, group: int) -> CodedMatrix:
    """Returns a matrix in codes.

    Args:
        values_RW: float32.
        bits: 1, 2, 3, 4, 8 or 16.
        group: Elements of a row that share a scale; not looked at for 16 bits.

    Raises:
        BadCheckpointError: A value is not finite.
    """
    if bits == 16:
        return _rounded_to_bfloat16(values_RW)
    return _rounded_to_bytes(values_RW) if bits == 8 else _rounded_to_levels(values_RW, bits, group)


def joined(parts: list[CodedMatrix]) -> CodedMatrix:
    """Returns the rows of several as one matrix."""
    first = parts[0]
    return CodedMatrix(
        bits=first.bits,
        group=first.group,
        width=first.width,
        codes_RB=torch.cat([part.codes_RB for part in parts]),
        scales_RG=torch.cat([part.scales_RG for part in parts]),
    )


def _rounded_to_levels(values_RW: torch.Tensor, bits: int, group: int) -> CodedMatrix:
    rows, width = values_RW.shape
    groups = num_groups(width, group)
    padding = groups * group - width
    values_RGg = F.pad(values_RW, (0, padding)).view(rows, groups, group)
    count = torch.full((groups,), float(group), device=values_RW.device)
    count[-1] -= padding
    levels = torch.tensor(LEVELS[bits], device=values_RW.device)
    middles = (levels[1:] + levels[:-1]) / 2
    if bits == 1:
        scales_RG = values_RGg.abs().sum(dim=2) / count
    else:
        scales_RG = (values_RGg.square().sum(dim=2) / count).sqrt()
        for _ in range(_ROUNDS):
            reached_RGg = levels[_nearest(values_RGg, scales_RG, middles)]
            reached_RGg.view(rows, -1)[:, width:] = 0
            scales_RG = (values_RGg * reached_RGg).sum(dim=2) / reached_RGg.square().sum(dim=2)
    kept_RG = _checked_scales(scales_RG)
    codes_RGg = _nearest(values_RGg, kept_RG.float(), middles).to(torch.uint8)
    codes_RW = codes_RGg.view(rows, -1)[:, :width]
    return CodedMatrix(
        bits=bits, group=group, width=width, codes_RB=pack_codes(codes_RW, bits), scales_RG=kept_RG
    )


def _nearest(
    values_RGg: torch.Tensor, scales_RG: torch.Tensor, middles: torch.Tensor
) -> torch.Tensor:
    """Returns which level each value is nearest to; where the scale is 0, any."""
    return torch.bucketize(values_RGg / scales_RG.clamp(min=_SMALLEST).unsqueeze(2), middles)


def _rounded_to_bytes(values_RW: torch.Tensor) -> CodedMatrix:
    """One scale a row, from its greatest magnitude."""
    rows, width = values_RW.shape
    scales_R1 = _checked_scales(values_RW.abs().amax(dim=1, keepdim=True) / _BYTE_LIMIT)
    steps_RW = (values_RW / scales_R1.float().clamp(min=_SMALLEST)).round_()
    codes_RB = values_RW.new_zeros((rows, code_row_bytes(width, 8)), dtype=torch.int8)
    codes_RB[:, :width] = steps_RW.clamp_(-_BYTE_LIMIT, _BYTE_LIMIT)
    return CodedMatrix(
        bits=8, group=width, width=width, codes_RB=codes_RB.view(torch.uint8), scales_RG=scales_R1
    )


def _rounded_to_bfloat16(values_RW: torch.Tensor) -> CodedMatrix:
    rows, width = values_RW.shape
    words_RW = values_RW.bfloat16().contiguous()
    _check_finite(words_RW)
    return CodedMatrix(
        bits=16,
        group=width,
        width=width,
        codes_RB=words_RW.view(torch.uint8),
        scales_RG=torch.empty((rows, 0), dtype=torch.bfloat16, device=values_RW.device),
    )


def _checked_scales(scales_RG: torch.Tensor) -> torch.Tensor:
    """Returns scales as they are stored."""
    kept_RG = scales_RG.bfloat16()
    _check_finite(kept_RG)
    return kept_RG


def _check_finite(values: torch.Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise BadCheckpointError(
            "A tensor's delta to the donor's is not finite, so it has no compressed form. "
            "Keep the tensor as the variant's own, or repair the checkpoint."
        )
