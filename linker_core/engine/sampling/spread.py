"""Drawing from rows whose mass is spread over many tokens, without sorting them.

A row is cut into the classes of its scores' upper bits; within the one class that counts, the lower
bits name the score. Masses are whole numbers, so their sums are exact in any order: a row draws
what it draws from its sorted scores, on any device and in any batch.

Legend: N rows, V columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

_UNIT = 2.0**35  # the largest score's mass; 2**18 such masses are still exact in float64
_LOW_BITS = 16
_NUM_HIGH, _NUM_LOW = 1 << 15, 1 << _LOW_BITS  # the sign of a key is 0
_SLICE_BYTES = 2 << 20  # of scores, held several times; more of them leave the caches


class Limits(NamedTuple):
    """What bounds the draw of each row, as columns of one table, each [N, 1]."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    mass: torch.Tensor  # of all columns, as `masses` counts; infinite where top-k bounds them
    uniform: torch.Tensor


def masses(scores: torch.Tensor) -> torch.Tensor:
    """Returns whole numbers in proportion to the exponentials of scores up to 0, as float64."""
    return scores.exp().mul_(_UNIT).round_().double()


def total_mass(scores_NV: torch.Tensor) -> torch.Tensor:
    """Returns the mass of each row, [N, 1]; its scores are 0 at the most."""
    num = _rows_at_once(scores_NV)
    parts = [
        masses(scores_NV[first : first + num]).sum(dim=1, keepdim=True)
        for first in range(0, len(scores_NV), num)
    ]
    return torch.cat(parts)


def draw_spread(scores_NV: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Draws one token per row, a slice of rows at a time.

    Args:
        scores_NV: float32, 0 at the most.
        limits: Of each row.

    Returns:
        Token ids [N].
    """
    num = _rows_at_once(scores_NV)
    parts = [
        _draw(scores_NV[first : first + num], Limits(*(c[first : first + num] for c in limits)))
        for first in range(0, len(scores_NV), num)
    ]
    return torch.cat(parts)


def _rows_at_once(scores_NV: torch.Tensor) -> int:
    return max(1, _SLICE_BYTES // (4 * scores_NV.shape[1]))


def _draw(scores_NV: torch.Tensor, limits: Limits) -> torch.Tensor:
    # The bits of what is not negative, read as a number, rise with it.
    keys_NV = scores_NV.abs().view(torch.int32)
    high_NV = (keys_NV >> _LOW_BITS).long()
    ranking = _Ranking(keys_NV, high_NV, masses(scores_NV))
    mass_N1 = limits.mass
    if bool(mass_N1.isinf().any()):
        first_N1 = ranking.sum_of_first(limits.top_k)
        mass_N1 = torch.where(mass_N1.isinf(), first_N1, mass_N1)
    # The fewest tokens whose mass reaches top_p, then the one of them that the number falls on.
    cut = ranking.at((limits.top_p * mass_N1).ceil().clamp_(1.0))
    num_N1 = cut.num_reaching
    kept_N1 = cut.before + num_N1 * cut.amount
    # Of whole numbers, the first sum beyond a target is the first to reach the next whole one.
    chosen = ranking.at((limits.uniform * kept_N1).floor().add_(1.0).minimum(kept_N1))
    # Equal scores stand in the order of their ids.
    row, column = (keys_NV == chosen.key).nonzero(as_tuple=True)
    num_equal_N = row.bincount(minlength=len(keys_NV))
    first_N = num_equal_N.cumsum(dim=0) - num_equal_N
    return column[first_N + chosen.num_reaching[:, 0] - 1]


class _Found(NamedTuple):
    """The score at which a sum in falling order of scores reaches a target, each [N, 1]."""

    key: torch.Tensor  # int32
    before: torch.Tensor  # the sum over all larger scores
    amount: torch.Tensor  # of one token with this score
    num_reaching: torch.Tensor  # of such tokens that it takes


class _Ranking:
    """Sums of amounts in the falling order of scores.

    Args:
        keys_NV: int32, not negative; the smaller one is the larger score.
        high_NV: The upper bits of the keys, int64.
        amounts_NV: Whole numbers, the same for equal keys.
    """

    def __init__(
        self, keys_NV: torch.Tensor, high_NV: torch.Tensor, amounts_NV: torch.Tensor
    ) -> None:
        self._keys_NV = keys_NV
        self._high_NV = high_NV
        self._amounts_NV = amounts_NV
        sums = amounts_NV.new_zeros(len(keys_NV), _NUM_HIGH)
        self._cumulated = sums.scatter_add_(1, high_NV, amounts_NV).cumsum(dim=1)

    def sum_of_first(self, num_N1: torch.Tensor) -> torch.Tensor:
        """Returns the sum over so many of the largest scores, [N, 1]."""
        ones_NV = torch.ones_like(self._keys_NV, dtype=torch.float32)
        last = _Ranking(self._keys_NV, self._high_NV, ones_NV).at(num_N1.float())
        above_N1 = self._amounts_NV.where(self._keys_NV < last.key, 0.0).sum(dim=1, keepdim=True)
        return above_N1 + last.num_reaching * masses(-last.key.view(torch.float32))

    def at(self, target_N1: torch.Tensor) -> _Found:
        """Finds where the sums reach targets from 1 on; what is above their end counts as that."""
        target_N1 = target_N1.minimum(self._cumulated[:, -1:])
        high_N1 = torch.searchsorted(self._cumulated, target_N1)
        before_N1 = F.pad(self._cumulated, (1, 0)).gather(1, high_N1)
        inside = (self._high_NV == high_N1).nonzero(as_tuple=True)
        low = self._keys_NV[inside].long() & (_NUM_LOW - 1)
        amounts = self._amounts_NV[inside]
        at = inside[0] * _NUM_LOW + low
        num_rows = len(target_N1)
        cumulated = torch.zeros(num_rows * _NUM_LOW, dtype=amounts.dtype, device=amounts.device)
        cumulated = cumulated.index_add_(0, at, amounts).view(num_rows, _NUM_LOW).cumsum(dim=1)
        low_N1 = torch.searchsorted(cumulated, target_N1 - before_N1)
        before_N1 = before_N1 + F.pad(cumulated, (1, 0)).gather(1, low_N1)
        key_N1 = ((high_N1 << _LOW_BITS) | low_N1).int()
        each = torch.zeros(num_rows * _NUM_LOW, dtype=amounts.dtype, device=amounts.device)
        each[at] = amounts
        amount_N1 = each.view(num_rows, _NUM_LOW).gather(1, low_N1)
        num_N1 = ((target_N1 - before_N1).long() + amount_N1.long() - 1) // amount_N1.long()
        return _Found(key_N1, before_N1, amount_N1, num_N1)
