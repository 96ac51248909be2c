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
        lowest_GC = _lowest_ids(scores_GV[tied_G], values[tied_G, num : num + 1], num)
        tied = Largest(found.values[tied_G], found.ids[tied_G])
        is_last_GC = tied.values == tied.values[:, -1:]
        place_GC = (is_last_GC.cumsum(dim=1) - 1).clamp_(min=0)
        found.ids[tied_G] = torch.where(is_last_GC, lowest_GC.gather(1, place_GC), tied.ids)
    return found


def _lowest_ids(scores_GV: torch.Tensor, value_G1: torch.Tensor, num: int) -> torch.Tensor:
    """Returns the lowest `num` columns with a score, rising; there are more than that, or any."""
    num_columns = scores_GV.shape[1]
    columns_V = torch.arange(num_columns, dtype=torch.int32, device=scores_GV.device)
    ids_GV = torch.where(scores_GV == value_G1, columns_V, num_columns)
    return ids_GV.topk(num, dim=1, largest=False).values.long()


def _sorted(scores_GV: torch.Tensor) -> Largest:
    values, ids = torch.sort(scores_GV, dim=1, descending=True, stable=True)
    return Largest(values, ids)


def _by_rising_id(values_GC: torch.Tensor, ids_GC: torch.Tensor) -> Largest:
    ids_GC, order_GC = ids_GC.sort(dim=1)
    values_GC, order_GC = torch.sort(
        values_GC.gather(1, order_GC), dim=1, descending=True, stable=True
    )
    return Largest(values_GC, ids_GC.gather(1, order_GC))
