"""Prices many plans in one walk: how far each takes the variant's answers from its own.

Legend: R response tokens, n rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from linker_core.sharing.price import Price
from linker_core.sharing.rungs import ENCODING
from linker_core.tuning.calibration import CalibrationText
from linker_core.tuning.shared_walk import LastHidden, SharedWalk
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.walk import Walk

_NUM_RESAMPLES = 2_000
_UPPER_PERCENTILE = 97.5  # upper end of a two-sided 95 % interval
_MIN_CLUSTERS = 8  # fewer say nothing of how answers differ
_CLUSTER_TOKENS = 32  # where there are too few answers: runs of so many tokens
_WORST_NATS = 500.0  # of a token; the exponential of a mean of them is still a number
_COMPARED_BYTES = 1 << 20  # of logits whose temporaries stay in the cache
_MIN_KIND_TOKENS = 400  # fewer say too little of a kind
_BOOTSTRAP_SEED = 20_250_101

Reals = npt.NDArray[np.float64]


class Pricer:
    """Prices plans of one pair on one text.

    Args:
        walk: Over the text's sequences.
        reader: Of the pair.
        own: The rungs of the unshared variant: the reference.
        text: The calibration text.
    """

    def __init__(
        self, walk: Walk, reader: SectionReader, own: Rungs, text: CalibrationText
    ) -> None:
        self._own = own
        self._precision = walk.precision
        self._text = text
        token_ids = [token for s in text.sequences for token in s.token_ids]
        predicting, self._sequence_of = _predicting_rows(text)
        self._targets_R = torch.tensor([token_ids[row + 1] for row in predicting]).to(walk.device)
        self._shared = SharedWalk(walk, reader, token_ids, predicting)
        self._reference: LastHidden | None = None

    @property
    def block_passes(self) -> int:
        """Blocks computed over the whole text so far."""
        return self._shared.block_passes

    @property
    def forward_passes(self) -> float:
        """Passes of the whole variant that the walks so far amount to."""
        return self._shared.forward_passes

    def price(self, plans: Sequence[Rungs]) -> list[Price]:
        """Returns the prices of plans, all on the same tokens.

        The variant's own pass is computed with the first call and kept.

        Args:
            plans: A rung for every tensor of the variant, each.
        """
        if not plans:
            return []
        missing = [self._own] if self._reference is None else []
        last = self._shared.last_hidden([*missing, *plans])
        if self._reference is None:
            self._reference, *last = last
        readings = self._read_logits(self._reference, last)
        return [self._price(reading) for reading in readings]

    @torch.inference_mode()
    def _read_logits(self, reference: LastHidden, planned: Sequence[LastHidden]) -> list[_Reading]:
        """Compares next-token distributions, a chunk of logits of two plans at a time."""
        readings = [_Reading(len(self._targets_R)) for _ in planned]
        for rows in self._shared.chunks():
            own_nV = self._shared.logits(reference, rows)
            targets_n = self._targets_R[rows]
            for plan, reading in zip(planned, readings, strict=True):
                planned_nV = self._shared.logits(plan, rows)
                reading.compare(rows.start, own_nV, planned_nV, targets_n)
        self._shared.forget()
        return readings

    def _price(self, reading: _Reading) -> Price:
        return Price(
            kl=float(reading.kl_R.mean()),
            kl_upper=self._kl_upper(reading.kl_R),
            top1=float(reading.agrees_R.mean()),
            ppl_ratio=float(np.exp(reading.loss_R.mean())),
            tokens=len(self._targets_R),
            calibration=self._text.digest,
            matmul_precision=self._precision,
            encoding=ENCODING,
        )

    def _kl_upper(self, kl_R: Reals) -> float:
        """Returns the upper end for the kind of text that suffers most, or for all of it.

        A fine-tune is moved furthest on the text it was tuned for, which one kind may stand for and
        the mean over all kinds would hide.
        """
        of = self._sequence_of
        parts = [np.ones(len(kl_R), dtype=np.bool_)]
        kinds = np.array([sequence.kind for sequence in self._text.sequences])[of]
        for kind in sorted(set(kinds)):
            of_kind = kinds == kind
            if of_kind.sum() >= _MIN_KIND_TOKENS:
                parts.append(of_kind)
        return max(
            max(float(kl_R[part].mean()), bootstrap_upper(kl_R[part], _clusters(of[part])))
            for part in parts
        )


class _Reading:
    """What is measured of one plan, response token by response token."""

    def __init__(self, num_tokens: int) -> None:
        self.kl_R: Reals = np.empty(num_tokens)  # KL(variant ‖ planned), nats
        self.agrees_R: Reals = np.empty(num_tokens)  # 1 where both prefer the same token
        self.loss_R: Reals = np.empty(num_tokens)  # planned minus own loss of the text's token

    def compare(
        self,
        first: int,
        own_nV: torch.Tensor,
        planned_nV: torch.Tensor,
        targets_n: torch.Tensor,
    ) -> None:
        """Takes in the logits of consecutive tokens, a few rows at a time to stay in the cache."""
        step = max(1, _COMPARED_BYTES // (4 * own_nV.shape[1]))
        for start in range(0, len(own_nV), step):
            part = slice(start, start + step)
            own = torch.log_softmax(own_nV[part], dim=-1)
            planned = torch.log_softmax(planned_nV[part], dim=-1)
            agrees = own.argmax(dim=-1) == planned.argmax(dim=-1)
            gain = own.sub_(planned)  # log p - log q; added to log q it gives log p back
            loss = gain.gather(1, targets_n[part].unsqueeze(1)).squeeze(1)
            kl = planned.add_(gain).exp_().mul_(gain).sum(dim=-1)
            rows = slice(first + start, first + start + len(kl))
            # Rounding can leave a tiny negative sum where both are equal. Logits that overflow are
            # no distribution: no answer is worse.
            worst = {"nan": _WORST_NATS, "posinf": _WORST_NATS, "neginf": _WORST_NATS}
            self.kl_R[rows] = kl.clamp_min_(0).nan_to_num_(**worst).cpu().numpy()
            self.agrees_R[rows] = agrees.cpu().numpy()
            self.loss_R[rows] = loss.nan_to_num_(**worst).cpu().numpy()


def bootstrap_upper(values_R: Reals, cluster_R: npt.NDArray[np.int64]) -> float:
    """Returns the upper end of a 95 % percentile-bootstrap interval of a mean.

    Whole sequences are drawn, since the tokens of one answer are not independent.

    Args:
        values_R: One per token.
        cluster_R: The sequence of each token, counted from 0.
    """
    sums, counts = np.bincount(cluster_R, values_R), np.bincount(cluster_R)
    sums, counts = sums[counts > 0], counts[counts > 0]
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    drawn = generator.integers(len(sums), size=(_NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return float(np.percentile(means, _UPPER_PERCENTILE))


def _clusters(sequence_of: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the cluster of each token: its sequence, or a run of tokens where those are few."""
    if len(np.unique(sequence_of)) >= _MIN_CLUSTERS:
        return sequence_of
    return np.arange(len(sequence_of)) // _CLUSTER_TOKENS


def _predicting_rows(text: CalibrationText) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Returns the rows whose logits predict a response token, and the sequence of each."""
    rows: list[int] = []
    sequence_of: list[int] = []
    first = 0
    for number, sequence in enumerate(text.sequences):
        positions = [first + p - 1 for span in sequence.responses for p in span]
        rows += positions
        sequence_of += [number] * len(positions)
        first += len(sequence.token_ids)
    return rows, np.array(sequence_of, dtype=np.int64)
