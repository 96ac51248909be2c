"""What requests change in their logits before a token is chosen, for many rows at once.

In vLLM's order: the grammar, allowed tokens, bad words, bias and minimum length, penalties.

Legend: G rows, V columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from linker_core.engine.grammar import GrammarMasks
from linker_core.engine.sampling.row_state import Ids, RowState


def apply_edits(scores_GV: torch.Tensor, states: Sequence[RowState], masks: GrammarMasks) -> None:
    """Changes the scores of every row in place, as its parameters ask for.

    Args:
        scores_GV: Contiguous; a token that cannot be chosen becomes -inf.
        states: Of each row.
        masks: Computes what grammars allow.
    """
    _Edits(scores_GV, states).apply(masks)


class _Edits:
    """Edits as positions in the flattened scores: each kind is one operation over all rows."""

    def __init__(self, scores_GV: torch.Tensor, states: Sequence[RowState]) -> None:
        self._scores_GV = scores_GV
        self._flat = scores_GV.view(-1)
        self._rows = [(row, state) for row, state in enumerate(states) if state.is_edited]

    def apply(self, masks: GrammarMasks) -> None:
        self._follow_grammars(masks)
        self._keep_allowed()
        self._ban()
        self._bias()
        self._penalise()

    def _follow_grammars(self, masks: GrammarMasks) -> None:
        found = [(row, s.matcher) for row, s in self._rows if s.matcher is not None]
        if not found:
            return
        rows = self._tensor(np.array([row for row, _ in found]))
        allowed_GV = masks.allowed([m for _, m in found], self._scores_GV.shape[1])
        forbidden_GV = torch.from_numpy(~allowed_GV).to(self._flat.device)
        self._scores_GV[rows] = self._scores_GV[rows].masked_fill_(forbidden_GV, -torch.inf)

    def _keep_allowed(self) -> None:
        found = [(row, s.allowed) for row, s in self._rows if s.allowed is not None]
        if not found:
            return
        at = self._at(found)
        kept = self._flat[at]
        self._scores_GV[self._tensor(np.array([row for row, _ in found]))] = -torch.inf
        self._flat[at] = kept

    def _ban(self) -> None:
        found = [(row, ids) for row, state in self._rows for ids in state.banned() if len(ids)]
        if found:
            self._flat[self._at(found)] = -torch.inf

    def _bias(self) -> None:
        found = [(row, state) for row, state in self._rows if len(state.bias_ids)]
        if found:
            at = self._at([(row, state.bias_ids) for row, state in found])
            self._flat[at] += self._tensor(np.concatenate([state.bias for _, state in found]))

    def _penalise(self) -> None:
        """Repetition divides what was ever seen; frequency and presence subtract from the output.

        Tokens for which a row asks nothing are divided by 1 and have 0 subtracted.
        """
        found = [(row, state, counts) for row, state in self._rows if (counts := state.counts())]
        if not found:
            return
        at = self._at([(row, counts.ids) for row, _, counts in found])
        sizes = [counts.size for _, _, counts in found]

        def spread(values: list[float]) -> torch.Tensor:
            return self._tensor(np.repeat(np.array(values, dtype=np.float32), sizes))

        repetition = spread([state.params.repetition_penalty for _, state, _ in found])
        frequency = spread([state.params.frequency_penalty for _, state, _ in found])
        presence = spread([state.params.presence_penalty for _, state, _ in found])
        times = self._tensor(np.concatenate([counts.num_generated for _, _, counts in found]))
        old = self._flat[at]
        new = torch.where(old > 0, old / repetition, old * repetition)
        self._flat[at] = new - (frequency * times + presence * (times > 0))

    def _at(self, found: Sequence[tuple[int, Ids]]) -> torch.Tensor:
        stride = self._scores_GV.shape[1]
        return self._tensor(np.concatenate([ids + row * stride for row, ids in found]))

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._flat.device)
