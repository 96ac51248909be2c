"""Choosing one token per row, many rows at once.

Order, as vLLM has it: log-probabilities of the raw distribution; then the grammar's mask, allowed
tokens, bad words, logit bias, minimum length, penalties; greedy rows take the largest; the others
temperature, min-p, top-k, top-p and one draw. What a row gets never depends on its batch mates.

Legend: R rows that want a token, V widest vocabulary, G rows that want more than the largest logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from linker_core.engine.grammar import GrammarMasks, unfollowable
from linker_core.engine.sampling.draw import RUN_COLUMNS, draw
from linker_core.engine.sampling.edits import apply_edits
from linker_core.engine.sampling.logprobs import score
from linker_core.engine.sampling.row_state import RowState
from linker_core.engine.sampling.uniform import uniforms
from linker_core.errors import InvalidRequestError, LinkerError, NumericalError


class Sampled(NamedTuple):
    """A chosen token; log-probabilities only if they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    ends_answer: bool = False  # the grammar is complete


Result = Sampled | LinkerError


def choose(
    logits_RV: torch.Tensor, states: Sequence[RowState], masks: GrammarMasks
) -> list[Result]:
    """Chooses for all rows, those that want nothing but the largest logit at once.

    Args:
        logits_RV: Raw logits; a row is valid up to its variant's own width and finite beyond.
        states: Of each row.
        masks: Computes what grammars allow.

    Returns:
        Per row the token, or the error that ends its sequence. Matchers are not moved on.
    """
    logits_RV = logits_RV.float()
    finite = _finite(logits_RV)
    logits_RV = _without_foreign_columns(logits_RV, states)
    results: list[Result] = [Sampled(token) for token in _argmax(logits_RV).tolist()]
    special = [row for row, state in enumerate(states) if finite[row] and not state.is_plain]
    if special:
        chosen = _choose_special(logits_RV, special, [states[row] for row in special], masks)
        for row, result in zip(special, chosen, strict=True):
            results[row] = result
    if not all(finite):
        for row, state in enumerate(states):
            if not finite[row]:
                results[row] = not_finite(state.sequence.model)
    return results


def _without_foreign_columns(logits_RV: torch.Tensor, states: Sequence[RowState]) -> torch.Tensor:
    """Returns the logits with -inf behind each row's own width."""
    narrower = {state.width for state in states if state.width < logits_RV.shape[1]}
    if narrower:
        logits_RV = logits_RV.clone()
    for width in narrower:
        rows = [row for row, state in enumerate(states) if state.width == width]
        logits_RV[rows, width:] = -torch.inf
    return logits_RV


def _argmax(scores_RV: torch.Tensor) -> torch.Tensor:
    """Returns the first largest column of each row."""
    if scores_RV.device.type == "cpu":
        # numpy's is vectorised over the columns of a row: ten times as fast as torch's.
        return torch.from_numpy(scores_RV.numpy().argmax(axis=1))
    return scores_RV.argmax(dim=1)


def _choose_special(
    logits_RV: torch.Tensor, rows: Sequence[int], states: Sequence[RowState], masks: GrammarMasks
) -> list[Result]:
    raw_GV = _rows(logits_RV, rows)
    scores_GV, is_dead = raw_GV, [False] * len(rows)
    if any(state.is_edited or not state.is_greedy for state in states):
        scores_GV = _with_whole_runs(raw_GV)
    if any(state.is_edited for state in states):
        apply_edits(scores_GV, states, masks)
        is_dead = (scores_GV.amax(dim=1) == -torch.inf).tolist()
    token_G = _take_or_draw(scores_GV, states, is_dead)
    tops = _alternatives(raw_GV, token_G, states)
    return [
        _dead_end(state) if dead else Sampled(token, *top)
        for state, dead, token, top in zip(states, is_dead, token_G.tolist(), tops, strict=True)
    ]


def _rows(logits_RV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]


def _with_whole_runs(raw_GV: torch.Tensor) -> torch.Tensor:
    """Returns a copy whose further columns, up to a whole run, can never be chosen."""
    num_rows, num_columns = raw_GV.shape
    width = -(-num_columns // RUN_COLUMNS) * RUN_COLUMNS
    scores_GV = raw_GV.new_full((num_rows, width), -torch.inf)
    scores_GV[:, :num_columns] = raw_GV
    return scores_GV


def _take_or_draw(
    scores_GV: torch.Tensor, states: Sequence[RowState], is_dead: Sequence[bool]
) -> torch.Tensor:
    drawn = [g for g, state in enumerate(states) if not state.is_greedy and not is_dead[g]]
    if len(drawn) == len(states):
        return _draw(scores_GV, states)
    token_G = _argmax(scores_GV)
    if drawn:
        token_G[drawn] = _draw(scores_GV[drawn], [states[g] for g in drawn])
    return token_G


def _draw(scores_GV: torch.Tensor, states: Sequence[RowState]) -> torch.Tensor:
    numbers = uniforms(
        [state.seed for state in states], [state.sequence.num_output for state in states]
    )
    uniform_G = torch.from_numpy(numbers).to(scores_GV.device)
    return draw(scores_GV, [state.params for state in states], uniform_G)


_NO_LOGPROBS = (None, ())


def _alternatives(
    raw_GV: torch.Tensor, token_G: torch.Tensor, states: Sequence[RowState]
) -> Iterable[tuple[float | None, tuple[tuple[int, float], ...]]]:
    """Returns the chosen token's log-probability and its alternatives, for rows that ask."""
    asking = [g for g, state in enumerate(states) if state.params.logprobs is not None]
    found: list[tuple[float | None, tuple[tuple[int, float], ...]]] = [_NO_LOGPROBS] * len(states)
    if not asking:
        return found
    wanted = [min(states[g].params.logprobs or 0, states[g].width) for g in asking]
    scored = score(_rows(raw_GV, asking), token_G[asking], max(wanted))
    logprobs, values = scored.logprobs.tolist(), scored.top_values.tolist()
    ids = scored.top_ids.tolist()
    for n, (g, num) in enumerate(zip(asking, wanted, strict=True)):
        found[g] = logprobs[n], tuple(zip(ids[n][:num], values[n][:num], strict=True))
    return found


def _finite(logits_RV: torch.Tensor) -> list[bool]:
    """Says of each row whether all its logits are finite."""
    # A finite sum has finite parts alone, and is much faster than any other look at all of them.
    finite: list[bool] = torch.isfinite(logits_RV.sum(dim=1)).tolist()
    if not all(finite):
        finite = torch.isfinite(logits_RV).all(dim=1).tolist()
    return finite


def _dead_end(state: RowState) -> LinkerError:
    if state.matcher is not None:
        return unfollowable(state.matcher.inner.get_error())
    params = state.params
    named = "allowed_token_ids" if params.allowed_token_ids is not None else "bad_words"
    return InvalidRequestError(
        f"No token is left to choose from: {named} and min_tokens together forbid every one. "
        "Relax one of them.",
        param=named,
    )


def not_finite(model: str) -> NumericalError:
    """Returns the error of a sequence whose numbers are none."""
    return NumericalError(
        f"Model '{model}' gave numbers that are not finite for this prompt, so no token "
        "can be chosen. Check the checkpoint's weights."
    )
