"""Which plans are worth pricing: block sets of BS, and those along a chain of least harm.

Knows rungs and bytes; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from linker_core.sharing.plan import tensor_bytes
from linker_core.sharing.planner import count_own_rows
from linker_core.sharing.report import Region, ScanReport
from linker_core.sharing.rungs import AnyRung, Rung
from linker_core.sharing.thresholds import Thresholds
from linker_core.tuning.chain import Chain, Offer
from linker_core.tuning.sensitivity import Sensitivity
from linker_core.tuning.storages import Rungs
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key

ALL_BLOCKS = "all blocks"
INTERIOR = "all blocks but the first and the last"
_FAR_POWER = 1.35  # from all blocks aliased down to a hundredth of their KL, on trained models


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan to price."""

    origin: str
    rungs: Rungs


class Candidates:
    """Makes candidates of one pair.

    Args:
        base: Rungs that change no bit; a candidate has cheaper ones.
        report: The pair's scan.
        donor: The donor's checkpoint.
        variant: The variant's checkpoint.
        sensitivities: What each rung of each weight does.
    """

    def __init__(
        self,
        *,
        base: Rungs,
        report: ScanReport,
        donor: Checkpoint,
        variant: Checkpoint,
        sensitivities: Sequence[Sensitivity],
    ) -> None:
        self._base = base
        self._epsilon = {block.index: block.epsilon for block in report.blocks}
        self._thresholds_of = {block.index: block for block in report.blocks}
        self._matrices: dict[int, list[str]] = {}  # block -> matrices that could alias
        for name, tensor in variant.tensors.items():
            layer = _layer(name)
            lent = donor.tensors.get(name)
            if layer is not None and len(tensor.shape) == 2:
                assert lent is not None
                self._matrices.setdefault(layer, []).append(name)
        self._is_outside = report.region is Region.OUTSIDE
        self._errors = {(one.name, one.rung): one.error for one in sensitivities}
        own_rows = count_own_rows(report, variant, base)

        def nbytes(name: str, rung: AnyRung) -> int:
            lent, num_own = donor.tensors.get(name), own_rows.get(name)
            return tensor_bytes(rung, variant.tensors[name], num_own_rows=num_own, donor=lent)

        self._offers: dict[str, list[Offer]] = {}
        for one in sensitivities:
            # Far from the donor nothing aliases that differs, however little a swap seems to cost.
            if not (self._is_outside and one.rung is Rung.ALIAS):
                offer = Offer(nbytes(one.name, one.rung), one.error, one.rung)
                self._offers.setdefault(one.name, []).append(offer)
        self._standing = {name: nbytes(name, base[name]) for name in self._offers}
        self.chain = Chain(base, self._standing, self._offers)

    def blocks(self, thresholds: Thresholds) -> list[Candidate]:
        """Returns the block sets of BS: a sweep over τ_frob, and one that spares the ends.

        The sweep is all blocks, what BS Eq. 3 shares under `thresholds`, and the half of them with
        the smaller ε. The first and the last block carry what barriers there are (BS appendix L),
        so one candidate never aliases them. Norms and biases stay the variant's. Those that tell
        most come first.
        """
        by_epsilon = sorted(self._matrices, key=lambda layer: self._epsilon[layer])
        half = by_epsilon[: len(by_epsilon) // 2]
        shared = [i for i, block in self._thresholds_of.items() if thresholds.shares(block)]
        last = max(self._matrices)
        sets = [
            (ALL_BLOCKS, by_epsilon),
            (INTERIOR, [layer for layer in by_epsilon if layer not in (0, last)]),
            (f"BS Eq. 3, {thresholds.source}", shared),
            (f"blocks with ε ≤ {max((self._epsilon[i] for i in half), default=0):.4f}", half),
        ]
        return _distinct(
            Candidate(origin=origin, rungs=self._aliasing(self._names(layers)))
            for origin, layers in sets
            if layers
        )

    def without_residuals(self) -> Chain:
        """Returns the chain of aliases and own tensors alone."""
        offers = {
            name: [offer for offer in offers if offer.rung is Rung.ALIAS]
            for name, offers in self._offers.items()
        }
        return Chain(self._base, self._standing, offers)

    def weighted(self, weights: Mapping[str, float]) -> Chain:
        """Returns the chain on which some kinds of matrices count more or less than measured.

        Args:
            weights: Factors of the errors by a part of the name; 1 for all others.
        """
        offers = {
            name: [offer._replace(error=offer.error * _weight(name, weights)) for offer in offers]
            for name, offers in self._offers.items()
        }
        return Chain(self._base, self._standing, offers)

    def harm(self, rungs: Rungs) -> float:
        """Returns the sum of the errors of what is not as it was."""
        return sum(self._errors.get((name, rung), 0.0) for name, rung in rungs.items())

    def may_be_chosen(self, rungs: Rungs) -> bool:
        """Whether a plan aliases nothing that it must not: outside the neighbourhood, a weight."""
        return not self._is_outside or all(
            self._base[name] is Rung.ALIAS for name, rung in rungs.items() if rung is Rung.ALIAS
        )

    def _names(self, layers: Iterable[int]) -> list[str]:
        return [name for layer in layers for name in self._matrices[layer]]

    def _aliasing(self, names: Iterable[str]) -> Rungs:
        return {**self._base, **dict.fromkeys(names, Rung.ALIAS)}


def harm_for(kl: float, measured: Sequence[tuple[float, float]]) -> float:
    """Returns the harm at which a KL is to be expected.

    Near a measured point the KL grows as a power of the harm: 1 where errors are independent, 2
    where they all point the same way, as those of one fine-tune do. Far below it, less than the
    local power: a KL saturates.

    Args:
        kl: What is aimed at, nats, positive.
        measured: (harm, KL) of priced plans, all positive; at least one.
    """
    points = sorted(measured, key=lambda point: abs(math.log(point[1] / kl)))
    harm, near = points[0]
    power = _FAR_POWER
    for other_harm, other in points[1:]:
        if other_harm != harm and other != near:
            slope = math.log(other / near) / math.log(other_harm / harm)
            power = min(2.0, max(1.0, slope))
            break
    return harm * math.exp(math.log(kl / near) / power)


def _weight(name: str, weights: Mapping[str, float]) -> float:
    return math.prod(weight for part, weight in weights.items() if part in name)


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    found: list[Candidate] = []
    for candidate in candidates:
        if all(candidate.rungs != other.rungs for other in found):
            found.append(candidate)
    return found


def _layer(name: str) -> int | None:
    key = parse_key(name)
    assert key is not None
    return key.layer
