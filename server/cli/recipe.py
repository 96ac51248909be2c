"""`linker tune DONOR VARIANT --recipe paper`: what BS appendix E makes of a pair and promises."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from linker_core.errors import InvalidRequestError
from linker_core.tuning.recipe_result import RecipePlan, RecipeResult
from linker_core.tuning.recipe_rules import DEFAULT_QUALITY_BUDGET, RecipeRequest
from linker_core.tuning.tasks import DEFAULT_LIMIT, load_task_set
from linker_core.weights.fingerprint import fingerprint
from server.cli.checkpoints import open_pair
from server.cli.progress import byte_progress
from server.cli.scanning import scan_apart

_MIB = 2**20


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what takes the place of a budget in nats."""
    parser.add_argument(
        "--recipe",
        choices=("paper",),
        help="instead: the block-sharing paper's appendix E (fit, sweep on PIQA, boundary rule), "
        "scored on held-out tasks and priced",
    )
    parser.add_argument(
        "--quality-budget",
        type=float,
        help=f"share of a score that the recipe may lose ({DEFAULT_QUALITY_BUDGET})",
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        help="directory of multiple-choice tasks as JSON lines: piqa*.jsonl and what to hold out",
    )
    parser.add_argument(
        "--limit", type=int, help=f"examples of each task that the recipe asks ({DEFAULT_LIMIT})"
    )


def refuse_recipe_arguments(args: argparse.Namespace) -> None:
    """Refuses what only the recipe understands.

    Raises:
        InvalidRequestError: Names the first one given.
    """
    for name in ("quality_budget", "tasks", "limit"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise InvalidRequestError(f"--{option} has no meaning without --recipe.", param=name)


def run_recipe(args: argparse.Namespace) -> int:
    """Scans, runs the recipe and prints; stdout holds one JSON document under --json."""
    for name in ("budget_kl", "max_bytes"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise InvalidRequestError(f"--{option} has no meaning with --recipe.", param=name)
    if args.tasks is None:
        raise InvalidRequestError(
            "--recipe asks multiple-choice questions; name their directory with --tasks.",
            param="tasks",
        )
    budget = DEFAULT_QUALITY_BUDGET if args.quality_budget is None else args.quality_budget
    tasks = load_task_set(args.tasks, limit=DEFAULT_LIMIT if args.limit is None else args.limit)
    report = scan_apart(args.donor, args.variant)
    with open_pair(args.donor, args.variant) as (donor, variant):
        with byte_progress("hashing the donor") as progress:
            digest = fingerprint(donor, progress=progress)
        logical_bytes = variant.nbytes
    request = RecipeRequest(
        donor=args.donor,
        variant=args.variant,
        report=report,
        donor_fingerprint=digest,
        tasks=tasks,
        quality_budget=budget,
        calibration=args.calibration,
        device=args.device or "cpu",
        matmul_precision=args.matmul_precision or "highest",
    )
    # Imported here: torch takes seconds, and an argument may be refused before.
    module = importlib.import_module("linker_core.tuning.recipe")
    paper_recipe: Callable[..., RecipeResult] = module.paper_recipe
    with byte_progress("asking and pricing") as progress:
        result = paper_recipe(request, progress=progress)
    if args.json:
        json.dump(result.to_json(), sys.stdout, indent=1)
        print()
    else:
        _print(result, logical_bytes=logical_bytes)
    return 0


def _print(result: RecipeResult, *, logical_bytes: int) -> None:
    console = Console()
    table = Table(
        "", "step", "τ_cos, τ_frob", "blocks", "saved", f"{result.sweep_task} kept",
        "held out kept: mean, worst", "over-promise: mean, worst", "KL, nats per token", "top-1",
    )  # fmt: skip
    for plan in result.plans:
        chosen = plan is result.chosen
        mark, style = ("→", "bold") if chosen else ("", "")
        table.add_row(mark, *_cells(plan, logical_bytes), style=style)
    console.print(table)
    swept = result.tasks[result.sweep_task]
    console.print(
        f"{result.sweep_task}: the variant has {swept.own.score:.1%} ± {swept.own.stderr:.1%} of "
        f"{swept.num_examples} right, guessing {swept.chance:.1%}. Mean ε {result.mean_epsilon:.4f}"
        + (" is a boundary case: the refinement is dropped." if result.boundary else ".")
    )
    console.print(f"{result.seconds:.1f} s")


def _cells(plan: RecipePlan, logical_bytes: int) -> list[str]:
    price = plan.price
    return [
        f"{plan.step} ({plan.thresholds.source})",
        f"{plan.thresholds.tau_cos}, {plan.thresholds.tau_frob:.4f}",
        str(plan.blocks_shared),
        f"{1 - plan.unique_bytes / logical_bytes:.0%}",
        f"{plan.promised:.1%}",
        f"{_number(plan.heldout_mean, 100)}, {_number(plan.heldout_worst, 100)} %",
        f"{_number(plan.over_promise_mean)}, {_number(plan.over_promise_worst)} points",
        f"{price.kl:.5f} (at most {price.kl_upper:.5f})",
        f"{price.top1:.2%}",
    ]


def _number(value: float | None, factor: float = 1.0) -> str:
    return "unknown" if value is None else f"{factor * value:.1f}"
