"""The plain path beside the vectorised one: one row, one token, in Python's own floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from linker_core.engine.sequence import SequenceState


def plain_scores(logits: Sequence[float], sequence: SequenceState) -> list[float]:
    """What a row's parameters make of its logits, one rule after the other."""
    params = sequence.sampling
    prompt = sequence.tokens[: sequence.num_prompt]
    output = sequence.tokens[sequence.num_prompt :]
    scores = list(logits)
    if params.allowed_token_ids is not None:
        scores = [s if t in params.allowed_token_ids else -math.inf for t, s in enumerate(scores)]
    for word in params.bad_words:
        begun = list(word[:-1])
        if not begun or output[-len(begun) :] == begun:
            scores[word[-1]] = -math.inf
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if len(output) < params.min_tokens:
        for token in params.stop_token_ids:
            scores[token] = -math.inf
    for token in {*prompt, *output}:
        repetition = params.repetition_penalty
        scores[token] *= 1 / repetition if scores[token] > 0 else repetition
        times = output.count(token)
        scores[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return scores


def plain_chances(logits: Sequence[float], sequence: SequenceState) -> dict[int, float]:
    """The tokens that may come next with their probabilities, in the order of the draw."""
    params = sequence.sampling
    scores = plain_scores(logits, sequence)
    top = max(scores)
    if params.temperature < 1e-5:
        return {scores.index(top): 1.0}
    weights = {t: math.exp((s - top) / params.temperature) for t, s in enumerate(scores)}
    weights = {t: w for t, w in weights.items() if w > 0 and w >= params.min_p}
    if (params.top_k or len(logits)) < len(logits) or params.top_p < 1.0:
        # Stable: equal ones stay in the order of their ids.
        ranked = sorted(weights, key=lambda token: -weights[token])[: params.top_k]
        wanted = params.top_p * sum(weights[token] for token in ranked)
        kept: dict[int, float] = {}
        for token in ranked:
            if sum(kept.values()) >= wanted:
                break
            kept[token] = weights[token]
        weights = kept
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def plain_choice(chances: dict[int, float], uniform: float) -> tuple[int, float]:
    """The token that the number falls on, and how far the number is from another one's."""
    passed = 0.0
    chosen, low = next(iter(chances)), 0.0
    for token, chance in chances.items():
        chosen, low = token, passed
        passed += chance
        if uniform < passed:
            break
    return chosen, min(uniform - low, abs(passed - uniform))
