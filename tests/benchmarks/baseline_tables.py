"""The lines of the comparison with others, and the tables that are printed of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks.rewritten import Measured

_PLANS = "ours, policy"  # begins the families of what the tuner chose


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One form of one variant."""

    variant: str
    family: str  # of the form: what is drawn as one line
    form: str
    bits_per_weight: float
    kl: float
    top1: float
    ppl_ratio: float
    accuracy: float

    @classmethod
    def of(cls, variant: str, family: str, form: str, measured: Measured) -> Line:
        """Builds a line from what was measured."""
        bits, price, accuracy = measured
        return cls(
            variant=variant,
            family=family,
            form=form,
            bits_per_weight=bits,
            kl=price.kl,
            top1=price.top1,
            ppl_ratio=price.ppl_ratio,
            accuracy=accuracy,
        )


def tables(lines: Sequence[Line]) -> Iterator[str]:
    """Yields the lines of a table for each variant."""
    for variant in dict.fromkeys(line.variant for line in lines):
        of_variant = [line for line in lines if line.variant == variant]
        plans = [x for x in of_variant if x.family.startswith(_PLANS)]
        yield f"### {variant}"
        yield ""
        yield "| form | bits per weight | KL | ours there | top-1 | perplexity | accuracy |"
        yield "|---|---|---|---|---|---|---|"
        for line in of_variant:
            ours = None if line in plans else kl_at(plans, line.bits_per_weight)
            yield (
                f"| {line.form} | {line.bits_per_weight:.2f} | {line.kl:.5f} "
                f"| {'' if ours is None else f'{ours:.5f}'} | {line.top1:.3f} "
                f"| {line.ppl_ratio:.3f} | {line.accuracy:.3f} |"
            )
        yield ""


def kl_at(plans: Sequence[Line], bits_per_weight: float) -> float | None:
    """Returns the KL that plans reach at a size: between two of them, the logarithm is even.

    A plan that another beats in both bits and KL is passed over. Above the largest plan it is that
    plan's KL, which fits there as well; below the smallest there is none.
    """
    best: list[tuple[float, float]] = []
    for bits, kl in sorted((plan.bits_per_weight, plan.kl) for plan in plans):
        if not best or kl < best[-1][1]:
            best.append((bits, kl))
    smaller = [point for point in best if point[0] <= bits_per_weight]
    larger = [point for point in best if point[0] > bits_per_weight]
    if not smaller:
        return None
    if not larger:
        return smaller[-1][1]
    (low, kl_low), (high, kl_high) = smaller[-1], larger[0]
    share = (bits_per_weight - low) / (high - low)
    return math.exp((1 - share) * math.log(kl_low) + share * math.log(kl_high))
