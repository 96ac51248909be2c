"""How likely the tokens of a prompt were, gathered while it is computed chunk by chunk.

Kept by position: a chunk that is computed again after a preemption writes the same numbers again.

Legend: N rows of a chunk, V columns, P positions with a token before them, C alternatives.
"""

from __future__ import annotations

import numpy as np
import torch

from linker_core.engine.messages import PromptScores
from linker_core.engine.sampling.choose import not_finite
from linker_core.engine.sampling.logprobs import score
from linker_core.engine.sequence import SequenceState


class PromptLogprobs:
    """The log-probabilities of one prompt.

    Args:
        sequence: A sequence that asks for them.
    """

    def __init__(self, sequence: SequenceState) -> None:
        assert sequence.sampling.prompt_logprobs is not None
        num_top = min(sequence.sampling.prompt_logprobs, sequence.vocab_size)
        num_positions = sequence.num_prompt - 1
        self._sequence = sequence
        self._logprob_P = np.empty(num_positions, dtype=np.float32)
        self._rank_P = np.zeros(num_positions, dtype=np.int64)  # 0: not computed yet
        self._top_values_PC = np.empty((num_positions, num_top), dtype=np.float32)
        self._top_ids_PC = np.empty((num_positions, num_top), dtype=np.int32)

    @torch.inference_mode()
    def take(self, start: int, logits_NV: torch.Tensor) -> None:
        """Takes what a chunk says of the tokens that follow its own.

        Args:
            start: Position of the first row.
            logits_NV: Raw logits, a row per token; valid up to the variant's own width.

        Raises:
            NumericalError: A token's log-probability is not finite.
        """
        sequence = self._sequence
        end = min(start + len(logits_NV), sequence.num_prompt - 1)
        if start >= end:
            return
        targets = torch.tensor(sequence.tokens[start + 1 : end + 1], device=logits_NV.device)
        own_NV = logits_NV[: end - start, : sequence.vocab_size]
        scored = score(own_NV, targets, self._top_ids_PC.shape[1], with_ranks=True)
        if not bool(scored.logprobs.isfinite().all()):
            raise not_finite(sequence.model)
        self._logprob_P[start:end] = scored.logprobs.cpu()
        self._rank_P[start:end] = scored.ranks.cpu()
        self._top_values_PC[start:end] = scored.top_values.cpu()
        self._top_ids_PC[start:end] = scored.top_ids.cpu()

    def records(self) -> PromptScores:
        """Returns an entry for every token of the prompt but its first."""
        assert self._rank_P.all(), "a row of the prompt was never computed"
        return PromptScores(
            token_ids=np.array(self._sequence.tokens[1 : self._sequence.num_prompt], np.int32),
            logprobs=self._logprob_P,
            ranks=self._rank_P,
            top_ids=self._top_ids_PC,
            top_values=self._top_values_PC,
        )
