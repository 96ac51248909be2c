"""Rounds matrices to codes and scales: the scale of each group is where the squared error is least.

Legend: R rows, W width, G groups of a row, g elements of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch.nn import functional as F

from linker_core.errors import BadCheckpointError
from linker_core.residency.coding import LEVELS, CodedMatrix, pack_codes
from linker_core.residency.rounding_kernel import load_rounding_loops
from linker_core.sharing.rungs import code_row_bytes, num_groups

# Scales to try first, in units of the group's root mean square. A group holds too few values to be
# normal: at 4 bits the best of these explains a fifth of the error that 1.0 leaves.
_STARTS: Final = {
    1: (1.0,),  # any gives the mean magnitude, which is the best
    2: (0.8, 1.0, 1.25),
    3: (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35),
    4: (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35),
}
_REFITS = 2  # of the best start's scale to the codes that it led to
_BYTE_LIMIT = 127  # an 8-bit element's magnitude
_SMALLEST = torch.finfo(torch.float32).tiny  # divides where a scale is 0


def rounded(values_RW: torch.Tensor, *, bits: int, group: int) -> CodedMatrix:
    """Returns a matrix in codes.

    Args:
        values_RW: float32, contiguous.
        bits: 1, 2, 3, 4, 8 or 16.
        group: Elements of a row that share a scale; not looked at for 16 bits.

    Raises:
        BadCheckpointError: A value is not finite.
    """
    if bits == 16:
        return _rounded_to_bfloat16(values_RW)
    return _rounded_to_bytes(values_RW) if bits == 8 else _rounded_to_levels(values_RW, bits, group)


def joined(parts: Sequence[CodedMatrix]) -> CodedMatrix:
    """Returns the rows of several as one matrix."""
    first = parts[0]
    return CodedMatrix(
        bits=first.bits,
        group=first.group,
        width=first.width,
        codes_RB=torch.cat([part.codes_RB for part in parts]),
        scales_RG=torch.cat([part.scales_RG for part in parts]),
    )


def fitted_scales(
    values_RW: torch.Tensor, *, bits: int, group: int, starts: Sequence[float], refits: int
) -> torch.Tensor:
    """Returns the scale of each group, float32 [R, G].

    Lloyd's rounds (1957) over the scale alone: values go to their nearest levels l, then the scale
    to <v, l> / <l, l>, which leaves <v, v> - <v, l>² / <l, l>. Of all scales tried the best stays.

    Args:
        values_RW: float32.
        bits: Of a code.
        group: Values of a row that share a scale.
        starts: First scales, in units of the group's root mean square.
        refits: Rounds from the best of them.
    """
    values_RGg, counts_G = _grouped(values_RW, group)
    spread_RG = (values_RGg.square().sum(dim=2) / counts_G).sqrt()
    best_RG, explained_RG = spread_RG, torch.zeros_like(spread_RG)
    levels = torch.tensor(LEVELS[bits], device=values_RW.device)
    for trial in range(len(starts) + refits):
        scales_RG = spread_RG * starts[trial] if trial < len(starts) else best_RG
        reached_RGg = levels[_nearest(values_RGg, scales_RG, bits)]
        reached_RGg.flatten(1)[:, values_RW.shape[1] :] = 0
        dots_RG = (values_RGg * reached_RGg).sum(dim=2)
        norms_RG = reached_RGg.square().sum(dim=2)
        better_RG = dots_RG.square() > explained_RG * norms_RG
        explained_RG = torch.where(better_RG, dots_RG.square() / norms_RG, explained_RG)
        best_RG = torch.where(better_RG, dots_RG / norms_RG, best_RG)
    return best_RG


def assigned_codes(
    values_RW: torch.Tensor, scales_RG: torch.Tensor, *, bits: int, group: int
) -> torch.Tensor:
    """Returns the code of the level that each value is nearest to, uint8 [R, W]."""
    values_RGg, _ = _grouped(values_RW, group)
    codes_RGg = _nearest(values_RGg, scales_RG, bits).to(torch.uint8)
    return codes_RGg.flatten(1)[:, : values_RW.shape[1]]


def check_finite(values: torch.Tensor) -> None:
    """Checks what was computed from a delta.

    Raises:
        BadCheckpointError: A value is not finite.
    """
    if not bool(values.isfinite().all()):
        raise BadCheckpointError(
            "A tensor's delta to the donor's is not finite, so it has no compressed form. "
            "Keep the tensor as the variant's own, or repair the checkpoint."
        )


def _rounded_to_levels(values_RW: torch.Tensor, bits: int, group: int) -> CodedMatrix:
    starts = _STARTS[bits]
    refits = _REFITS if len(starts) > 1 else 0
    on_cpu = values_RW.device.type == "cpu"
    fit = load_rounding_loops().fit if on_cpu else fitted_scales
    scales_RG = fit(values_RW, bits=bits, group=group, starts=starts, refits=refits)
    kept_RG = _checked_scales(scales_RG)
    # Codes belong to the scales that are stored, not to those that were found.
    assign = load_rounding_loops().assign if on_cpu else assigned_codes
    codes_RW = assign(values_RW, kept_RG.float(), bits=bits, group=group)
    return CodedMatrix(
        bits=bits,
        group=group,
        width=values_RW.shape[1],
        codes_RB=pack_codes(codes_RW, bits),
        scales_RG=kept_RG,
    )


def _grouped(values_RW: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows as [R, G, g], zeros behind the last, and how many values a group has, [G]."""
    rows, width = values_RW.shape
    groups = num_groups(width, group)
    padding = groups * group - width
    counts_G = torch.full((groups,), float(group), device=values_RW.device)
    counts_G[-1] -= padding
    return F.pad(values_RW, (0, padding)).view(rows, groups, group), counts_G


def _nearest(values_RGg: torch.Tensor, scales_RG: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns which level each value is nearest to; where the scale is 0, any."""
    levels = torch.tensor(LEVELS[bits], device=values_RGg.device)
    middles = (levels[1:] + levels[:-1]) / 2
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
    # A copy of its own, dense where a dimension is 1, too.
    words_RW = values_RW.bfloat16().clone(memory_format=torch.contiguous_format)
    check_finite(words_RW)
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
    check_finite(kept_RG)
    return kept_RG
