"""Log-probabilities of chosen tokens, their ranks and their alternatives, of the raw logits.

Legend: N rows, V columns, C alternatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from linker_core.engine.sampling.largest import largest

SLICE_BYTES = 8 << 20  # of log-probabilities held at once


class Scored(NamedTuple):
    """What the rows say of one token each; alternatives in falling order."""

    logprobs: torch.Tensor  # [N]
    ranks: torch.Tensor  # [N], 1 for the likeliest
    top_values: torch.Tensor  # [N, C]
    top_ids: torch.Tensor


def score(
    logits_NV: torch.Tensor, token_N: torch.Tensor, num_top: int, *, with_ranks: bool = False
) -> Scored:
    """Scores one token per row, a slice of rows at a time.

    Args:
        logits_NV: Raw logits; -inf in columns that are not the row's.
        token_N: Token ids.
        num_top: Alternatives wanted; no more are given than there are columns.
        with_ranks: Whether to count the likelier tokens; otherwise there are no ranks.
    """
    step = max(1, SLICE_BYTES // (4 * logits_NV.shape[1]))
    parts = [
        _score(logits_NV[first : first + step], token_N[first : first + step], num_top, with_ranks)
        for first in range(0, len(token_N), step)
    ]
    return parts[0] if len(parts) == 1 else Scored(*map(torch.cat, zip(*parts, strict=True)))


def _score(
    logits_NV: torch.Tensor, token_N: torch.Tensor, num_top: int, with_ranks: bool
) -> Scored:
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=1)
    own_N1 = logprobs_NV.gather(1, token_N.unsqueeze(1))
    top = largest(logprobs_NV, num_top) if num_top else None
    empty = own_N1[:, :0]
    return Scored(
        own_N1[:, 0],
        (logprobs_NV > own_N1).sum(dim=1) + 1 if with_ranks else token_N[:0],
        empty if top is None else top.values[:, :num_top],
        empty.long() if top is None else top.ids[:, :num_top],
    )
