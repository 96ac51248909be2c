"""What budgets buy, with residuals and without, and how they hold on text that is held out.

`python -m tests.benchmarks.fidelity FAMILY [VARIANT …]` prints the table of docs/fidelity.md.
FAMILY is a folder of checkpoints with `base` and `heldout/*.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from linker_core.sharing.rungs import Residual
from linker_core.tuning.request import TuneGoal
from linker_core.tuning.result import PricedPlan
from tests.benchmarks.held_out import held_out_text, opened
from tests.benchmarks.ours import BUDGETS_KL, Ours, named_variants


class Bought(NamedTuple):
    """What one budget buys of one variant."""

    variant: str
    region: str
    budget_kl: float
    plan: PricedPlan
    bits_per_weight: float
    share: float  # of a copy
    share_without: float  # the smallest priced plan without residuals that is within the budget
    held_out_kl: float


def measure(family: Path, variant: str, kept: Path | None) -> Iterator[Bought]:
    """Tunes one variant for every budget, and prices the choices on its held-out text."""
    with opened(family, variant) as pair:
        side = Ours(pair, held_out_text(pair.variant), kept=kept)
        results = [side.tuned(TuneGoal(budget_kl=budget_kl)) for budget_kl in BUDGETS_KL]
        prices = side.prices([result.chosen.rungs for result in results])
    priced = [plan for result in results for plan in result.frontier]
    for budget_kl, result, price in zip(BUDGETS_KL, results, prices, strict=True):
        yield Bought(
            variant=variant,
            region=pair.report.region,
            budget_kl=budget_kl,
            plan=result.chosen,
            bits_per_weight=8 * result.chosen.unique_bytes / side.num_weights,
            share=result.chosen.unique_bytes / pair.variant.nbytes,
            share_without=_smallest_without_residuals(priced, budget_kl) / pair.variant.nbytes,
            held_out_kl=price.kl,
        )


def _smallest_without_residuals(plans: Iterable[PricedPlan], budget_kl: float) -> int:
    return min(
        plan.unique_bytes
        for plan in plans
        if plan.price.kl_upper <= budget_kl
        and not any(isinstance(rung, Residual) for rung in plan.rungs.values())
    )


def table(bought: Iterable[Bought]) -> Iterator[str]:
    """Yields the table's lines."""
    yield (
        "| variant | budget | bits per weight | of a copy | without residuals | KL | upper "
        "| held-out KL | of the budget |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for each in bought:
        price = each.plan.price
        yield (
            f"| {each.variant} ({each.region}) | {each.budget_kl} | {each.bits_per_weight:.2f} "
            f"| {each.share:.1%} | {each.share_without:.0%} | {price.kl:.5f} "
            f"| {price.kl_upper:.5f} | {each.held_out_kl:.5f} "
            f"| {each.held_out_kl / each.budget_kl:.2f} |"
        )


def main() -> None:
    """Measures the variants that are named, or all with held-out text."""
    family, names, keep = named_variants(__doc__)
    print("\n".join(table([each for name in names for each in measure(family, name, keep)])))


if __name__ == "__main__":
    main()
