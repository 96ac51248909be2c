"""The forms in which others keep a fine-tune: a matrix that is rebuilt, and the bits it takes.

The arithmetic alone, on one matrix; none of their kernels. Legend: O, I of a weight, r rank,
n values of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

_SCALE_BITS = 16
_CLIPS = torch.linspace(0.4, 1.0, 25)  # of a group's range, tried for the least squared error


class Rebuilt(NamedTuple):
    """A weight as it comes out of a form."""

    weight_OI: torch.Tensor  # float32
    num_bits: int


Form = Callable[[str, torch.Tensor, torch.Tensor], Rebuilt]  # tensor's name, donor's, variant's


def alias(_name: str, donor_OI: torch.Tensor, _variant_OI: torch.Tensor) -> Rebuilt:
    """BS: the donor's, for nothing."""
    return Rebuilt(donor_OI, 0)


def low_rank(rank: int) -> Form:
    """LoRA extraction: the truncated SVD of the delta, its factors in 16 bits."""

    def form(_name: str, donor_OI: torch.Tensor, variant_OI: torch.Tensor) -> Rebuilt:
        left, values, right = torch.linalg.svd(variant_OI - donor_OI, full_matrices=False)
        root = values[:rank].sqrt()
        up_Or = (left[:, :rank] * root).bfloat16()
        down_rI = (right[:rank] * root.unsqueeze(1)).bfloat16()
        num_bits = 16 * (up_Or.numel() + down_rI.numel())
        return Rebuilt(donor_OI + up_Or.float() @ down_rI.float(), num_bits)

    return form


def one_scale(scale_of: Callable[[str, torch.Tensor], float] | None = None) -> Form:
    """BitDelta: the delta's signs times one scale for the whole matrix.

    Args:
        scale_of: The scale by name and delta; None: the mean of |delta|, where BitDelta begins.
    """

    def form(name: str, donor_OI: torch.Tensor, variant_OI: torch.Tensor) -> Rebuilt:
        delta_OI = variant_OI - donor_OI
        scale = delta_OI.abs().mean().item() if scale_of is None else scale_of(name, delta_OI)
        weight_OI = donor_OI + scale * signs(delta_OI)
        return Rebuilt(weight_OI, delta_OI.numel() + _SCALE_BITS)

    return form


def signs(delta_OI: torch.Tensor) -> torch.Tensor:
    """Returns +1 or -1 for every weight; a bit has no third value for 0."""
    return torch.where(delta_OI > 0, 1.0, -1.0)


def sparse(bits: int, *, group: int = 64) -> Form:
    """DeltaZip: the two larger of every four deltas of a row, in codes with a scale per group.

    A kept value's place among its four takes two bits, as in the format of the GPUs' sparse units.

    Args:
        bits: Of a kept value's code.
        group: Kept values of a row that share a scale.
    """

    def form(_name: str, donor_OI: torch.Tensor, variant_OI: torch.Tensor) -> Rebuilt:
        delta_OI = variant_OI - donor_OI
        fours = delta_OI.view(len(delta_OI), -1, 4)
        places = fours.abs().topk(2, dim=2).indices.sort(dim=2).values
        kept = fours.gather(2, places)
        codes = round_to_nearest(kept.flatten(1), bits, group=group)
        fours = torch.zeros_like(fours).scatter_(2, places, codes.weight_OI.view_as(kept))
        num_bits = codes.num_bits + 2 * kept.numel()
        return Rebuilt(donor_OI + fours.view_as(delta_OI), num_bits)

    return form


def own_codes(bits: int, *, group: int = 64) -> Form:
    """The variant's own weights in codes, with nothing of the donor."""

    def form(_name: str, _donor_OI: torch.Tensor, variant_OI: torch.Tensor) -> Rebuilt:
        return round_to_nearest(variant_OI, bits, group=group)

    return form


def round_to_nearest(values_OI: torch.Tensor, bits: int, *, group: int) -> Rebuilt:
    """Rounds to evenly spaced levels, as many below zero as above, at each group's best clipping.

    Args:
        values_OI: Rows of a multiple of `group` values.
        bits: Of a code.
        group: Values of a row that share a scale, 16 bits.
    """
    groups_n = values_OI.reshape(-1, group)
    half = 2 ** (bits - 1)
    widest = groups_n.abs().amax(dim=1, keepdim=True) / (half - 0.5)
    best = torch.zeros_like(groups_n)
    least = torch.full_like(widest, torch.inf)
    for clip in _CLIPS:
        scale = (clip * widest).bfloat16().float().clamp_min(torch.finfo(torch.float32).tiny)
        codes = (groups_n / scale).floor().clamp(-half, half - 1)
        rounded = (codes + 0.5) * scale
        error = (rounded - groups_n).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    num_bits = values_OI.numel() * bits + len(groups_n) * _SCALE_BITS
    return Rebuilt(best.view_as(values_OI), num_bits)
