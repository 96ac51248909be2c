"""The largest scores of each row in one order for all: falling, equal ones by rising id.

`topk` leaves the order of equal scores open, and with it what a seed gives.

Legend: G rows, V columns, C chosen ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Largest(NamedTuple):
    """Scores in falling order with their columns; what ties at -inf has any column."""

    values: torch.Tensor  # [G, C]
    ids: torch.Tensor


def largest(scores_GV: torch.Tensor, num: int) -> Largest:
    """Returns the `num` largest scores of each row, or all of them if there are fewer."""
    if num >= scores_GV.shape[1]:
        return _sorted(scores_GV)
    values, ids = scores_GV.topk(num + 1, dim=1)
    # Where the next one is as large, topk was free to take either.
    tied_G = (values[:, num - 1] == values[:, num]) & (values[:, num] > -torch.inf)
    found = _by_rising_id(values[:, :num], ids[:, :num])
    if bool(tied_G.any()):
        exact = _sorted(scores_GV[tied_G])
        found.values[tied_G] = exact.values[:, :num]
        found.ids[tied_G] = exact.ids[:, :num]
    return found


def _sorted(scores_GV: torch.Tensor) -> Largest:
    values, ids = torch.sort(scores_GV, dim=1, descending=True, stable=True)
    return Largest(values, ids)


def _by_rising_id(values_GC: torch.Tensor, ids_GC: torch.Tensor) -> Largest:
    ids_GC, order_GC = ids_GC.sort(dim=1)
    values_GC, order_GC = torch.sort(
        values_GC.gather(1, order_GC), dim=1, descending=True, stable=True
    )
    return Largest(values_GC, ids_GC.gather(1, order_GC))
