"""Priced plans as a table, and how a plan's bytes divide among rungs in words."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from linker_core.tuning.result import PricedPlan, TuneResult
from server.cli.sizes import mib_cell

_WITHOUT_RESIDUALS = "○"
_LEGEND = (
    f"{_WITHOUT_RESIDUALS}: aliases and own tensors alone · MiB: held by the variant alone · bits:"
    " a weight, scales, norms and embedding included · at most: of a bootstrap interval, which a"
    " budget is held against · ppl: perplexity ratio"
)
_LEAST_SHARE = 0.005  # of a plan's bytes that is worth a word


def print_frontier(
    console: Console, result: TuneResult, *, checkpoint_bytes: int, num_weights: int
) -> None:
    """Prints every priced plan as a row, the choice marked →; `saved` is of the checkpoint.

    Eighty columns take it: names of plans are wrapped at words, numbers are whole.
    """
    table = Table(
        caption=f"chosen: {rung_mix(result.chosen.rung_bytes)} of its bytes",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    table.add_column("", no_wrap=True)
    for title in ("MiB", "saved", "bits", "KL, nats", "at most", "top-1", "ppl"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(" plan")
    for plan in result.frontier:
        chosen = plan == result.chosen
        mark = ("→" if chosen else "") + ("" if plan.has_residuals else _WITHOUT_RESIDUALS)
        style = "bold" if chosen else ""
        table.add_row(mark, *_cells(plan, checkpoint_bytes, num_weights), style=style)
    console.print(table)
    console.print(_LEGEND)


def _cells(plan: PricedPlan, checkpoint_bytes: int, num_weights: int) -> list[str]:
    price = plan.price
    return [
        mib_cell(plan.unique_bytes),
        f"{1 - plan.unique_bytes / checkpoint_bytes:.0%}",
        f"{8 * plan.unique_bytes / num_weights:.2f}",
        f"{price.kl:.5f}",
        f"{price.kl_upper:.5f}",
        f"{price.top1:.1%}",
        f"{price.ppl_ratio:.3f}",
        f" {plan.origin}",
    ]


def rung_mix(rung_bytes: Mapping[str, int]) -> str:
    """Returns each kind's share of the unique bytes, the largest first."""
    total = sum(rung_bytes.values())
    shares = {kind: nbytes / total for kind, nbytes in rung_bytes.items() if nbytes}
    named = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{kind} {share:.0%}" for kind, share in named if share >= _LEAST_SHARE]
    return ", ".join(words) or "nothing"
