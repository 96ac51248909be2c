"""Drawing tokens at a temperature, within min-p, top-k and top-p, for many rows at once.

No row is sorted whole, and no sum of a row depends on how many rows there are or on how wide the
others are: a row alone draws what it draws in any batch.

Legend: G rows, V columns, C candidates, B runs of columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from linker_core.engine.messages import SamplingParams
from linker_core.engine.sampling.largest import Largest, largest
from linker_core.engine.sampling.spread import Limits, draw_spread, masses, total_mass

RUN_COLUMNS = 64  # scores have whole runs; a draw sums runs first, then looks into one
_FIRST = 64  # candidates that hold the mass of most distributions
_FEW = 1024  # a larger top-k is not forced on the other rows


def draw(
    scores_GV: torch.Tensor, params: Sequence[SamplingParams], uniform_G: torch.Tensor
) -> torch.Tensor:
    """Draws one token per row.

    Args:
        scores_GV: float32, -inf where a token cannot be chosen, not everywhere in a row; V is a
            multiple of `RUN_COLUMNS`. Overwritten.
        params: Of each row; temperatures are above 0.
        uniform_G: One number of [0, 1) for each row, float64.

    Returns:
        Token ids [G].
    """
    device = scores_GV.device
    temperature_G = torch.tensor([p.temperature for p in params], device=device)
    scores_GV -= scores_GV.amax(dim=1, keepdim=True)
    scores_GV /= temperature_G.unsqueeze(1)
    if any(p.min_p > 0.0 for p in params):
        # p >= min_p * max p, in logarithms; the largest score is 0.
        floor = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
        floor_G1 = torch.tensor(floor, device=device).unsqueeze(1)
        scores_GV.masked_fill_(scores_GV < floor_G1, -torch.inf)
    is_ranked = [p.top_k is not None or p.top_p < 1.0 for p in params]
    if all(is_ranked):
        return _draw_ranked(scores_GV, params, uniform_G)
    if not any(is_ranked):
        return _draw_unranked(scores_GV, uniform_G)
    ranked_G = torch.tensor(is_ranked, device=device)
    few = [p for p, ranked in zip(params, is_ranked, strict=True) if ranked]
    tokens_G = torch.empty(len(params), dtype=torch.long, device=device)
    tokens_G[ranked_G] = _draw_ranked(scores_GV[ranked_G], few, uniform_G[ranked_G])
    tokens_G[~ranked_G] = _draw_unranked(scores_GV[~ranked_G], uniform_G[~ranked_G])
    return tokens_G


def _draw_unranked(scores_GV: torch.Tensor, uniform_G: torch.Tensor) -> torch.Tensor:
    """Draws from all columns, in the order of their ids."""
    weights_GV = scores_GV.exp_()
    masses_GB = _run_masses(weights_GV)
    cumulated_GB = masses_GB.cumsum(dim=1)
    target_G1 = uniform_G.unsqueeze(1) * cumulated_GB[:, -1:]
    run_G1 = _position(masses_GB, cumulated_GB, target_G1)
    before_G1 = F.pad(cumulated_GB, (1, 0)).gather(1, run_G1)
    rows = torch.arange(len(scores_GV), device=scores_GV.device)
    run_GC = _runs(weights_GV)[rows, run_G1[:, 0]].double()
    inside_G1 = _position(run_GC, run_GC.cumsum(dim=1), target_G1 - before_G1)
    return (run_G1 * RUN_COLUMNS + inside_G1)[:, 0]


def _draw_ranked(
    scores_GV: torch.Tensor, params: Sequence[SamplingParams], uniform_G: torch.Tensor
) -> torch.Tensor:
    """Draws from the largest scores of each row, few of them wherever these are enough."""
    limits = _limits(scores_GV, params, uniform_G)
    few = [p.top_k for p in params if p.top_k is not None and p.top_k <= _FEW]
    tokens_G, is_enough_G = _draw_among(largest(scores_GV, max(_FIRST, *few, 0)), limits)
    if not bool(is_enough_G.all()):
        rest = Limits(*(column[~is_enough_G] for column in limits))
        tokens_G[~is_enough_G] = draw_spread(scores_GV[~is_enough_G], rest)
    return tokens_G


def _limits(
    scores_GV: torch.Tensor, params: Sequence[SamplingParams], uniform_G: torch.Tensor
) -> Limits:
    device, num_columns = scores_GV.device, scores_GV.shape[1]
    top_k = [num_columns if p.top_k is None else p.top_k for p in params]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    mass = torch.full_like(uniform_G, torch.inf).unsqueeze(1)
    whole = [g for g, p in enumerate(params) if p.top_k is None]
    if whole:
        mass[whole] = total_mass(scores_GV if len(whole) == len(params) else scores_GV[whole])
    return Limits(
        top_k=torch.tensor(top_k, device=device).unsqueeze(1),
        top_p=top_p.unsqueeze(1),
        mass=mass,
        uniform=uniform_G.unsqueeze(1),
    )


def _draw_among(candidates: Largest, limits: Limits) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from the candidates; says for which rows these hold all that may be drawn."""
    weights_GC = masses(candidates.values)
    num_candidates = weights_GC.shape[1]
    ranks_C = torch.arange(num_candidates, device=weights_GC.device)
    weights_GC.masked_fill_(ranks_C >= limits.top_k, 0.0)
    cumulated_GC = weights_GC.cumsum(dim=1)
    by_rank = torch.isinf(limits.mass)
    mass = torch.where(by_rank, cumulated_GC[:, -1:], limits.mass)
    wanted_G1 = limits.top_p * mass
    is_enough_G1 = torch.where(
        by_rank, limits.top_k <= num_candidates, cumulated_GC[:, -1:] >= wanted_G1
    )
    # The fewest tokens whose mass reaches top_p: those before which it is not reached yet.
    before_GC = F.pad(cumulated_GC[:, :-1], (1, 0))
    weights_GC.masked_fill_((before_GC >= wanted_G1) & (limits.top_p < 1.0), 0.0)
    cumulated_GC = weights_GC.cumsum(dim=1)
    rank_G1 = _position(weights_GC, cumulated_GC, limits.uniform * cumulated_GC[:, -1:])
    return candidates.ids.gather(1, rank_G1)[:, 0], is_enough_G1[:, 0]


def _position(
    weights_GC: torch.Tensor, cumulated_GC: torch.Tensor, target_G1: torch.Tensor
) -> torch.Tensor:
    """Returns where the cumulated weights pass the target, [G, 1]; a weight there is never 0."""
    found_G1 = torch.searchsorted(cumulated_GC, target_G1, right=True)
    # Rounding may put the target on the total itself: then the last with any weight is meant.
    columns_C = torch.arange(weights_GC.shape[1], device=weights_GC.device)
    last_G1 = torch.where(weights_GC > 0, columns_C, 0).amax(dim=1, keepdim=True)
    return torch.minimum(found_G1, last_G1)


def _runs(weights_GV: torch.Tensor) -> torch.Tensor:
    return weights_GV.view(len(weights_GV), -1, RUN_COLUMNS)


def _run_masses(weights_GV: torch.Tensor) -> torch.Tensor:
    return _runs(weights_GV).sum(dim=2).double()
