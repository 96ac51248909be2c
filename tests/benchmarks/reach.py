"""How small variants get, and what that costs on text that nothing has seen, beside what was asked.

`python -m tests.benchmarks.reach FAMILY [VARIANT …]` prints the table of docs/fidelity.md. FAMILY
is a folder of checkpoints with `base` and `heldout/*.jsonl`; the demo's (`linker demo`) is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from linker_core.tuning.request import DEFAULT_BUDGET_KL
from tests.benchmarks.held_out import held_out_text, opened
from tests.benchmarks.ours import Ours, named_variants

# KL by bits per weight, and at the default budget the share of a copy; by variant.
_LIGHT_KL = {4.6: 0.0001, 2.6: 0.003, 1.2: 0.018}
KL_BARS: Mapping[str, Mapping[float, float]] = {
    "instruct": _LIGHT_KL,
    "chat": _LIGHT_KL,
    "math": {4.6: 0.0002, 2.6: 0.006, 1.2: 0.05},
    "code": {4.6: 0.002, 2.6: 0.04},
}
SHARE_BARS = {"instruct": 0.11, "chat": 0.11, "math": 0.13, "code": 0.25}
SIZES_BITS = (4.6, 2.6, 1.2)


class Reached(NamedTuple):
    """One plan of one variant."""

    variant: str
    aim: str
    bits_per_weight: float
    share: float  # of a copy in the variant's own type
    kl: float
    bar: str
    met: bool | None  # None: no bar


def measure(family: Path, variant: str, kept: Path | None) -> Iterator[Reached]:
    """Yields what each size costs, and how large the default budget leaves the variant."""
    with opened(family, variant) as pair:
        side = Ours(pair, held_out_text(pair.variant), kept=kept)
        plans = [side.within_bits(bits) for bits in SIZES_BITS]
        plans.append(side.within_budget(DEFAULT_BUDGET_KL))
        sizes = [side.unique_bytes(plan) for plan in plans]
        prices = side.prices(plans)
    bars = [*map(KL_BARS.get(variant, {}).get, SIZES_BITS), SHARE_BARS.get(variant)]
    aims = [*(f"≤ {bits} bits" for bits in SIZES_BITS), f"KL ≤ {DEFAULT_BUDGET_KL}"]
    for i, (aim, nbytes, price, bar) in enumerate(zip(aims, sizes, prices, bars, strict=True)):
        share = nbytes / pair.variant.nbytes
        is_of_size = i < len(SIZES_BITS)
        yield Reached(
            variant=variant,
            aim=aim,
            bits_per_weight=8 * nbytes / side.num_weights,
            share=share,
            kl=price.kl,
            bar="" if bar is None else f"KL ≤ {bar}" if is_of_size else f"≤ {bar} of a copy",
            met=None if bar is None else (price.kl if is_of_size else share) <= bar,
        )


def table(reached: Sequence[Reached]) -> Iterator[str]:
    """Yields the table's lines."""
    yield "| variant | asked for | bits per weight | of a copy | held-out KL | bar | reached |"
    yield "|---|---|---|---|---|---|---|"
    for each in reached:
        verdict = {True: "yes", False: "**no**", None: ""}[each.met]
        yield (
            f"| {each.variant} | {each.aim} | {each.bits_per_weight:.2f} | {each.share:.3f} "
            f"| {each.kl:.5f} | {each.bar} | {verdict} |"
        )


def main() -> None:
    """Measures the variants that are named, or all with held-out text."""
    family, names, keep = named_variants(__doc__)
    print("\n".join(table([each for name in names for each in measure(family, name, keep)])))


if __name__ == "__main__":
    main()
