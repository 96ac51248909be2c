"""Choosing the next token of each row from its logits.

Order, as vLLM has it: log-probabilities of the raw distribution; then logit bias, minimum length,
penalties; greedy rows take the largest; the others temperature, min-p, top-k, top-p and one draw
from the sequence's own generator, so that batch mates never change what a seed gives.

Legend: R rows that want a token, V vocabulary, C candidates.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from linker_core.engine.messages import SamplingParams
from linker_core.engine.sequence import SequenceState
from linker_core.errors import EngineFailureError, LinkerError, NumericalError

_log = logging.getLogger(__name__)

# Below this a softmax is one-hot to float32, and dividing by it overflows.
_GREEDY_TEMPERATURE = 1e-5


class Sampled(NamedTuple):
    """A chosen token; log-probabilities only if they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(
    logits_RV: torch.Tensor, sequences: Sequence[SequenceState]
) -> list[Sampled | LinkerError]:
    """Chooses one token per row.

    Args:
        logits_RV: Raw logits; a row is valid up to its variant's own width and finite beyond.
        sequences: The sequence of each row.

    Returns:
        Per row the token, or the error that ends this sequence alone.
    """
    logits_RV = logits_RV.float()
    low_R, high_R = torch.aminmax(logits_RV, dim=1)
    finite = (torch.isfinite(low_R) & torch.isfinite(high_R)).tolist()
    greedy = _argmax([row for row, ok in enumerate(finite) if ok], logits_RV, sequences)
    results: list[Sampled | LinkerError] = []
    for row, sequence in enumerate(sequences):
        if not finite[row]:
            results.append(_not_finite(sequence))
        elif row in greedy:
            results.append(Sampled(greedy[row]))
        else:
            results.append(_contained(logits_RV[row, : sequence.vocab_size], sequence))
    return results


def _argmax(
    rows: Sequence[int], logits_RV: torch.Tensor, sequences: Sequence[SequenceState]
) -> dict[int, int]:
    """Chooses for all rows at once that want nothing but the largest logit."""
    by_width: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        if _is_plain_greedy(sequences[row]):
            by_width[sequences[row].vocab_size].append(row)
    chosen: dict[int, int] = {}
    for width, group in by_width.items():
        part_RV = logits_RV if len(group) == len(logits_RV) else logits_RV[group]
        chosen |= zip(group, part_RV[:, :width].argmax(dim=1).tolist(), strict=True)
    return chosen


def _is_plain_greedy(sequence: SequenceState) -> bool:
    return (
        sequence.sampling.temperature < _GREEDY_TEMPERATURE
        and sequence.sampling.logprobs is None
        and not _changes_logits(sequence)
    )


def _changes_logits(sequence: SequenceState) -> bool:
    params = sequence.sampling
    return (
        bool(params.logit_bias)
        or sequence.num_output < params.min_tokens
        or params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _contained(logits_V: torch.Tensor, sequence: SequenceState) -> Sampled | LinkerError:
    try:
        return _choose(logits_V, sequence)
    except Exception:  # noqa: BLE001 - one request must not end the others of its batch
        _log.exception("sampling failed for request %s", sequence.request_id)
        return EngineFailureError("The next token could not be chosen. See the server's log.")


def _choose(logits_V: torch.Tensor, sequence: SequenceState) -> Sampled:
    params = sequence.sampling
    scores_V = logits_V
    if _changes_logits(sequence):
        scores_V = _processed(logits_V.clone(), sequence)
    if params.temperature < _GREEDY_TEMPERATURE:
        token_id = int(scores_V.argmax())
    else:
        token_id = _draw(scores_V, params, sequence.generator)
    if params.logprobs is None:
        return Sampled(token_id)
    return _with_logprobs(logits_V, token_id, params.logprobs)


def _with_logprobs(logits_V: torch.Tensor, token_id: int, num_top: int) -> Sampled:
    logprobs_V = torch.log_softmax(logits_V, dim=0)
    values, ids = logprobs_V.topk(min(num_top, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token_id, float(logprobs_V[token_id]), top)


def _processed(scores_V: torch.Tensor, sequence: SequenceState) -> torch.Tensor:
    """Applies bias, minimum length and penalties in place."""
    params = sequence.sampling
    width = len(scores_V)
    for token_id, bias in params.logit_bias.items():
        scores_V[token_id] += bias
    if sequence.num_output < params.min_tokens:
        stops = [token_id for token_id in params.stop_token_ids if 0 <= token_id < width]
        scores_V[stops] = -math.inf
    if params.repetition_penalty != 1.0:
        seen = torch.unique(_ids(sequence.tokens, scores_V))
        old = scores_V[seen]
        penalty = params.repetition_penalty
        scores_V[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        output = _ids(sequence.tokens[sequence.num_prompt :], scores_V)
        seen, counts = torch.unique(output, return_counts=True)
        scores_V[seen] -= params.frequency_penalty * counts + params.presence_penalty
    return scores_V


def _ids(tokens: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.long, device=like.device)


def _draw(scores_V: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draws one token: exactly one number is taken from the generator."""
    scores_C = (scores_V - scores_V.max()) / params.temperature
    if params.min_p > 0.0:
        # p >= min_p * max p, in logarithms; the largest score is 0.
        scores_C = scores_C.masked_fill(scores_C < math.log(params.min_p), -math.inf)
    ids_C: torch.Tensor | None = None
    if params.top_k is not None and params.top_k < len(scores_C):
        scores_C, ids_C = scores_C.topk(params.top_k)
    elif params.top_p < 1.0:
        scores_C, ids_C = scores_C.sort(descending=True, stable=True)
    probs_C = torch.softmax(scores_C, dim=0, dtype=torch.float64)
    if params.top_p < 1.0:
        # The fewest tokens whose mass reaches top_p: those before which it is not reached yet.
        before_C = probs_C.cumsum(0) - probs_C
        probs_C = probs_C.masked_fill(before_C >= params.top_p, 0.0)
    cumulated_C = probs_C.cumsum(0)
    target = torch.rand((), generator=generator, dtype=torch.float64).to(cumulated_C.device)
    chosen = int(torch.searchsorted(cumulated_C, target * cumulated_C[-1], right=True))
    # Rounding may put the target on the total itself: then the last token with any mass is meant.
    chosen = min(chosen, int(probs_C.nonzero()[-1]))
    return chosen if ids_C is None else int(ids_C[chosen])


def _not_finite(sequence: SequenceState) -> NumericalError:
    return NumericalError(
        f"Model '{sequence.model}' gave logits that are not finite for this prompt, so no token "
        "can be chosen. Check the checkpoint's weights."
    )
