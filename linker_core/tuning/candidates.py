"""Which plans are worth pricing: block sets of BS, and prefixes of the order of least harm.

Knows rungs and bytes; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from linker_core.sharing.report import ScanReport
from linker_core.sharing.rungs import Rung
from linker_core.sharing.thresholds import Thresholds
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
        base: Rungs that change no bit; a candidate aliases more.
        report: The pair's scan.
        donor: The donor's checkpoint.
        variant: The variant's checkpoint.
        sensitivities: What swapping each weight does.
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
        # Least harm per byte first: a prefix of this order saves most for what it costs.
        self.order = tuple(
            sorted(sensitivities, key=lambda s: s.error / variant.tensors[s.name].nbytes)
        )

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

    def prefix(self, length: int) -> Candidate:
        """Returns the plan that aliases the `length` weights of least harm."""
        names = [sensitivity.name for sensitivity in self.order[:length]]
        return Candidate(origin=f"{length} weights of least harm", rungs=self._aliasing(names))

    def harm(self, rungs: Rungs) -> float:
        """Returns the sum of the errors of what is aliased."""
        return sum(
            sensitivity.error for sensitivity in self.order if rungs[sensitivity.name] is Rung.ALIAS
        )

    def prefix_of_harm(self, harm: float) -> int:
        """Returns the length of the longest prefix whose errors sum to at most `harm`."""
        total = 0.0
        for length, sensitivity in enumerate(self.order):
            total += sensitivity.error
            if total > harm:
                return length
        return len(self.order)

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
