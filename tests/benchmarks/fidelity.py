"""The frontier of every variant of a family, and how its price holds on text that is held out.

`python -m tests.benchmarks.fidelity FAMILY` prints the tables of docs/fidelity.md and draws its
picture. FAMILY is a folder of checkpoints with `base` and `heldout/*.jsonl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from linker_core.sharing.rungs import Rung
from linker_core.sharing.scan import scan
from linker_core.text.chat_template import ChatTemplate
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.calibration import CalibrationText, encode
from linker_core.tuning.dialogues import load_dialogues
from linker_core.tuning.reading import VariantReader
from linker_core.tuning.request import TuneGoal, TuneRequest
from linker_core.tuning.result import PricedPlan
from linker_core.tuning.tuner import tune
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.tuning.pairs import Pair

BUDGETS_KL = (0.003, 0.01, 0.03, 0.1, 0.3)
_MIB = 2**20
_PICTURE = Path("docs/fidelity.svg")


class Choice(NamedTuple):
    """What was chosen within a budget, and its KL on text that nothing has seen."""

    budget_kl: float
    plan: PricedPlan
    held_out_kl: float


class Curve(NamedTuple):
    """Everything that was priced of one variant."""

    name: str
    region: str
    logical_bytes: int
    plans: Sequence[PricedPlan]
    choices: Sequence[Choice]


def measure(family: Path, name: str) -> Curve:
    """Tunes one variant for every budget, and prices the choices on its held-out text."""
    with Checkpoint.open(family / "base") as donor, Checkpoint.open(family / name) as variant:
        pair = Pair(donor=donor, variant=variant, report=scan(donor, variant))
        plans: dict[int, PricedPlan] = {}
        chosen = []
        for budget_kl in BUDGETS_KL:
            result = tune(_request(pair, budget_kl))
            chosen.append(result.chosen)
            plans |= {plan.unique_bytes: plan for plan in result.frontier}
        prices = pair.pricer(held_out_text(pair)).price([plan.rungs for plan in chosen])
        return Curve(
            name=name,
            region=pair.report.region,
            logical_bytes=variant.nbytes,
            plans=sorted(plans.values(), key=lambda plan: plan.unique_bytes),
            choices=[
                Choice(budget, plan, price.kl)
                for budget, plan, price in zip(BUDGETS_KL, chosen, prices, strict=True)
            ],
        )


def held_out_text(pair: Pair) -> CalibrationText:
    """Returns the family's texts for this variant that nothing was trained or calibrated on."""
    path = pair.variant.path
    reader = VariantReader(
        tokenizer=Tokenizer.load(path),
        template=ChatTemplate.load(path),
        eos_token_ids=pair.variant.eos_token_ids,
        vocab_size=pair.variant.config.vocab_size,
    )
    dialogues = load_dialogues(path.parent / "heldout" / f"{path.name}.jsonl")
    return encode([dialogue for dialogue in dialogues if dialogue.given], reader)


def tables(curves: Iterable[Curve]) -> Iterable[str]:
    """Yields the lines of a section for each variant."""
    for curve in curves:
        yield f"### {curve.name} ({curve.region})"
        yield ""
        yield "| plan | weights aliased | unique MiB | saved | KL | upper | top-1 | perplexity |"
        yield "|---|---|---|---|---|---|---|---|"
        for plan in curve.plans:
            aliased = sum(rung is Rung.ALIAS for rung in plan.rungs.values())
            saved = 1 - plan.unique_bytes / curve.logical_bytes
            price = plan.price
            yield (
                f"| {plan.origin} | {aliased} | {plan.unique_bytes / _MIB:.2f} | {saved:.0%} "
                f"| {price.kl:.5f} | {price.kl_upper:.5f} | {price.top1:.3f} "
                f"| {price.ppl_ratio:.3f} |"
            )
        yield ""
        yield "| budget | chosen: unique MiB | KL | upper | held-out KL | over budget |"
        yield "|---|---|---|---|---|---|"
        for choice in curve.choices:
            price = choice.plan.price
            yield (
                f"| {choice.budget_kl} | {choice.plan.unique_bytes / _MIB:.2f} | {price.kl:.5f} "
                f"| {price.kl_upper:.5f} | {choice.held_out_kl:.5f} "
                f"| {choice.held_out_kl / choice.budget_kl:.2f} |"
            )
        yield ""


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draws unique bytes against KL, calibration as lines and held-out choices as crosses."""
    mpl.rcParams["svg.hashsalt"] = "linker"  # the same picture gives the same file
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        plans = [plan for plan in curve.plans if plan.price.kl > 0]
        (line,) = axes.plot(
            [plan.unique_bytes / curve.logical_bytes * 100 for plan in plans],
            [plan.price.kl for plan in plans],
            marker=".",
            label=f"{curve.name} ({curve.region})",
        )
        held_out = [choice for choice in curve.choices if choice.held_out_kl > 0]
        axes.plot(
            [choice.plan.unique_bytes / curve.logical_bytes * 100 for choice in held_out],
            [choice.held_out_kl for choice in held_out],
            linestyle="none",
            marker="x",
            color=line.get_color(),
        )
    axes.set_yscale("log")
    axes.set_xlabel("unique bytes, % of a copy")
    axes.set_ylabel("KL(variant ‖ planned), nats per token")
    axes.set_title("What sharing costs: priced plans (dots), choices on held-out text (crosses)")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def _request(pair: Pair, budget_kl: float) -> TuneRequest:
    return TuneRequest(
        donor=str(pair.donor.path),
        variant=str(pair.variant.path),
        report=pair.report.to_json(),
        donor_fingerprint="",
        goal=TuneGoal(budget_kl=budget_kl),
    )


def main() -> None:
    """Measures every variant beside `base`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("family", type=Path)
    family = parser.parse_args().family
    names = sorted(path.stem for path in (family / "heldout").glob("*.jsonl"))
    curves = [measure(family, name) for name in names]
    print("\n".join(tables(curves)))
    draw(curves, _PICTURE)


if __name__ == "__main__":
    main()
