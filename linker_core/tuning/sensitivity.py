"""Ranks rungs of sub-parameters by the error they cause on the variant's own hidden states.

One forward pass of the variant; of a sample of its rows, what goes into every product is kept, and
the products with each rung's error are taken when a block has run. A guide for choosing
candidates, never a price.

Legend: n rows of a sample, I input features, O output features, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linker_core.residency.stored import StoredTensor
from linker_core.sharing.rungs import AnyRung, Rung
from linker_core.tuning.block_probe import BlockProbe, RungErrors, relative, squares
from linker_core.tuning.memory import LOGITS_CHUNK_BYTES, SAMPLE_ROWS
from linker_core.tuning.row_errors import RowErrors
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.walk import Walk
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What one weight on a rung below its own does, relative to the residual stream."""

    name: str
    rung: AnyRung
    error: float  # of the residual stream that the rung can change, |δ|² / |h|²; about nats


@torch.inference_mode()
def measure_sensitivities(
    walk: Walk, reader: SectionReader, own: Rungs, token_ids: Sequence[int]
) -> list[Sensitivity]:
    """Runs the variant once and measures every rung that a matrix may take.

    Embedding and head are measured too; a head's error is the KL itself. Any other weight is
    charged its relative output error times the share of the residual stream that its
    sublayer writes, since that is what the error can become.

    Args:
        walk: Over the same text.
        reader: Of the pair.
        own: The rungs of the unshared variant.
        token_ids: All sequences, one after the other.
    """
    stride = -(-len(token_ids) // SAMPLE_ROWS)
    hidden_TH = walk.embed(reader.storages(None, own), token_ids)
    errors: RungErrors = {}
    for layer in range(walk.config.num_layers):
        probe = BlockProbe(walk, reader, layer, stride)
        with probe.attached():
            (hidden_TH,) = walk.block(
                layer, [reader.storages(layer, own)], [hidden_TH], watch=probe.watch
            )
        errors |= probe.errors()
        reader.forget(layer)
    ends = _Ends(walk, reader, own, token_ids[::stride], hidden_TH[::stride])
    for name in (EMBED_NAME, LM_HEAD_NAME):
        if name in reader.names(None):
            errors |= ends.errors(name)
    reader.forget(None)  # only now: what is outside the blocks is read once for both its ends
    return [
        Sensitivity(name=name, rung=rung, error=error) for (name, rung), error in errors.items()
    ]


class _Ends:
    """Compares embeddings and heads with the variant's own, on tokens that occur.

    Args:
        walk: Whose operations are used.
        reader: Of the pair.
        own: The rungs of the unshared variant.
        token_ids: What enters the model.
        hidden_nH: What leaves the last block.
    """

    def __init__(
        self,
        walk: Walk,
        reader: SectionReader,
        own: Rungs,
        token_ids: Sequence[int],
        hidden_nH: torch.Tensor,
    ) -> None:
        self._walk, self._reader = walk, reader
        self._own = reader.storages(None, own)
        self._hidden_nH = hidden_nH
        ids_n = torch.tensor(token_ids, device=hidden_nH.device)
        self._distinct, self._place_n = torch.unique(ids_n, return_inverse=True)

    def errors(self, name: str) -> RungErrors:
        """Returns what each rung of one of the two matrices does; tied, it does both."""
        offered = self._reader.offered(name)
        if not offered:
            return {}
        errors = RowErrors(self._reader, name, self._distinct)
        is_tied = self._own[EMBED_NAME] is self._own[LM_HEAD_NAME]
        whole_nH = self._reader.whole(name, Rung.OWN).tensor[self._distinct].float()
        alias_kl = alias_squares = 0.0
        if name == LM_HEAD_NAME or is_tied:
            alias_kl = self._alias_kl(name)
            alias_squares = self._logit_squares(errors.of(Rung.ALIAS))
        found: RungErrors = {}
        for rung in offered:
            missed_nH = errors.of(rung)
            error = 0.0
            if name == EMBED_NAME:
                error += float(
                    relative(squares(missed_nH), squares(whole_nH))[self._place_n].mean()
                )
            if alias_squares:
                # A small change of logits costs in proportion to its square.
                error += alias_kl * self._logit_squares(missed_nH) / alias_squares
            found[name, rung] = error
        return found

    def _logit_squares(self, rows_nH: torch.Tensor) -> float:
        head = StoredTensor(tensor=rows_nH.to(self._walk.dtype))
        swapped = {**self._own, LM_HEAD_NAME: head}
        return float(squares(self._walk.logits(swapped, self._hidden_nH)).mean())

    def _alias_kl(self, name: str) -> float:
        """Returns the mean KL, nats, that a head of the donor's rows causes."""
        own = self._reader.whole(name, Rung.OWN)
        lent = self._reader.whole(name, Rung.ALIAS)
        if lent.num_rows != own.num_rows:
            rows = [lent.tensor[: own.num_rows], own.tensor[lent.num_rows :]]
            lent = StoredTensor(tensor=torch.cat(rows))
        swapped = {**self._own, LM_HEAD_NAME: lent}
        total = 0.0
        step = max(1, LOGITS_CHUNK_BYTES // (4 * self._walk.config.vocab_size))
        for start in range(0, len(self._hidden_nH), step):
            own_nV, swapped_nV = (
                torch.log_softmax(
                    self._walk.logits(side, self._hidden_nH[start : start + step]), dim=-1
                )
                for side in (self._own, swapped)
            )
            gain_nV = torch.sub(own_nV, swapped_nV, out=swapped_nV)
            # Rounding can leave a tiny negative sum where both are equal.
            total += float(own_nV.exp_().mul_(gain_nV).sum(dim=-1).clamp_min_(0).sum())
        return total / len(self._hidden_nH)
