"""Priced plans as a table, and how a plan's bytes divide among rungs in words."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from linker_core.tuning.result import PricedPlan, TuneResult

_MIB = 2**20
_LEAST_SHARE = 0.005  # of a plan's bytes that is worth a word


def frontier_table(result: TuneResult, *, checkpoint_bytes: int, num_weights: int) -> Table:
    """Returns every priced plan as a row, the choice marked; `saved` is of the checkpoint."""
    table = Table(
        *("", "plan", "unique MiB", "saved", "bits", "rungs by bytes"),
        *("KL (nats)", "KL at most", "top-1", "perplexity ratio"),
        caption="bits are those of a weight, scales, norms and embedding included",
    )
    for plan in result.frontier:
        mark, style = ("→", "bold") if plan == result.chosen else ("", "")
        table.add_row(mark, *_cells(plan, checkpoint_bytes, num_weights), style=style)
    return table


def _cells(plan: PricedPlan, checkpoint_bytes: int, num_weights: int) -> list[str]:
    price = plan.price
    return [
        plan.origin,
        f"{plan.unique_bytes / _MIB:.2f}",
        f"{1 - plan.unique_bytes / checkpoint_bytes:.0%}",
        f"{8 * plan.unique_bytes / num_weights:.2f}",
        rung_mix(plan.rung_bytes) if plan.has_residuals else "alias and own alone",
        f"{price.kl:.5f}",
        f"{price.kl_upper:.5f}",
        f"{price.top1:.2%}",
        f"{price.ppl_ratio:.4f}",
    ]


def rung_mix(rung_bytes: Mapping[str, int]) -> str:
    """Returns each kind's share of the unique bytes, the largest first."""
    total = sum(rung_bytes.values())
    shares = {kind: nbytes / total for kind, nbytes in rung_bytes.items() if nbytes}
    named = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{kind} {share:.0%}" for kind, share in named if share >= _LEAST_SHARE]
    return ", ".join(words) or "nothing"
