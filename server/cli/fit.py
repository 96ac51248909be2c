"""`linker plan --fit SIZE DONOR V1 V2 …`: plans with which all variants fit into one memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from linker_core.errors import InvalidRequestError
from linker_core.sharing.plan import count_weights
from linker_core.tuning.fit import Fit, FitPoint, fit
from linker_core.tuning.request import FIT_POINTS, TuneGoal
from linker_core.tuning.result import PricedPlan
from linker_core.weights.checkpoint import Checkpoint
from server.cli.checkpoints import open_pair
from server.cli.frontier import rung_mix
from server.cli.scanning import scan_apart
from server.cli.sizes import mib, mib_cell
from server.cli.tune import size_argument, tune_pair


@dataclass(frozen=True, slots=True, kw_only=True)
class JointPlan:
    """A plan for each variant that fits, and what there was room for."""

    found: Fit
    frontiers: dict[str, tuple[PricedPlan, ...]]  # by the variant's directory
    num_weights: dict[str, int]
    donor_bytes: int
    kv_bytes: int
    memory_bytes: int

    @property
    def least_bytes(self) -> int:
        """Of the memory that all of them would need."""
        return self.donor_bytes + self.kv_bytes + self.found.least_bytes

    def chosen(self, name: str) -> PricedPlan | None:
        """Returns a variant's plan, or None if it does not fit."""
        place = self.found.chosen.get(name)
        return None if place is None else self.frontiers[name][place]

    def to_json(self) -> dict[str, Any]:
        """Returns the plans as plain JSON values; a variant that does not fit has none."""
        models = []
        for name in self.frontiers:
            plan = self.chosen(name)
            models.append({"source": name, "plan": None if plan is None else plan.to_json()})
        return {
            "fits": self.found.fits,
            "left_out": list(self.found.left_out),
            "memory_bytes": self.memory_bytes,
            "donor_bytes": self.donor_bytes,
            "kv_bytes": self.kv_bytes,
            "unique_bytes": self.found.unique_bytes,
            "least_bytes": self.least_bytes,
            "models": models,
        }


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the memory that several variants are fitted into."""
    parser.add_argument(
        "--fit",
        type=size_argument,
        metavar="SIZE",
        help="memory for the donor, all VARIANTs and the pages (24GiB): chooses a plan for each "
        "variant so that the worst KL, and then the mean, is least",
    )
    parser.add_argument(
        "--kv",
        type=size_argument,
        metavar="SIZE",
        help="with --fit or --memory-budget: of it for pages (0 with --fit, else what a server's "
        "default settings set aside)",
    )


def plan_jointly(args: argparse.Namespace, variants: Sequence[Path]) -> JointPlan:
    """Prices a spread of plans of every variant, one after the other, and chooses among them.

    The least that a variant can hold is among them, so one that is left out has no smaller plan.

    Raises:
        InvalidRequestError: No variant, one of them twice, or no room beside donor and pages.
        LinkerError: Damaged files, or a text of no use.
    """
    names = [str(variant) for variant in variants]
    if not names or len(set(names)) < len(names):
        raise InvalidRequestError("--fit needs DONOR and one or more VARIANTs, each once.")
    with Checkpoint.open(args.donor) as donor:
        donor_bytes = donor.nbytes
    kv_bytes: int = args.kv or 0
    budget_bytes = args.fit - donor_bytes - kv_bytes
    if budget_bytes < 0:
        raise InvalidRequestError(
            f"--fit {args.fit} leaves nothing for variants: the donor takes {donor_bytes} bytes "
            f"and pages {kv_bytes}."
        )
    frontiers: dict[str, tuple[PricedPlan, ...]] = {}
    num_weights: dict[str, int] = {}
    for name, path in zip(names, variants, strict=True):
        report = scan_apart(args.donor, path)
        goal = TuneGoal(num_points=FIT_POINTS)
        with open_pair(args.donor, path) as (donor, variant):
            result = tune_pair(donor, variant, report, args, goal=goal, donor_fingerprint="")
            num_weights[name] = count_weights(variant)
        frontiers[name] = result.frontier
    points = {
        name: [FitPoint(plan.unique_bytes, plan.price.kl) for plan in frontier]
        for name, frontier in frontiers.items()
    }
    return JointPlan(
        found=fit(points, budget_bytes),
        frontiers=frontiers,
        num_weights=num_weights,
        donor_bytes=donor_bytes,
        kv_bytes=kv_bytes,
        memory_bytes=args.fit,
    )


def print_joint_plan(console: Console, joint: JointPlan) -> None:
    """Prints a row for each variant, and whether all of them fit."""
    table = Table("variant", "unique MiB", "bits", "KL (nats)", "KL at most", "rungs by bytes")
    for name in joint.frontiers:
        plan = joint.chosen(name)
        if plan is None:
            table.add_row(name, "does not fit")
            continue
        table.add_row(
            name,
            mib_cell(plan.unique_bytes),
            f"{8 * plan.unique_bytes / joint.num_weights[name]:.2f}",
            f"{plan.price.kl:.5f}",
            f"{plan.price.kl_upper:.5f}",
            rung_mix(plan.rung_bytes),
        )
    console.print(table)
    taken = joint.donor_bytes + joint.kv_bytes + joint.found.unique_bytes
    console.print(
        f"donor {mib(joint.donor_bytes)} · pages {mib(joint.kv_bytes)} · variants "
        f"{mib(joint.found.unique_bytes)} · {mib(taken)} of {mib(joint.memory_bytes)}"
    )
    if not joint.found.fits:
        left_out = ", ".join(joint.found.left_out)
        console.print(
            f"does not fit: {left_out}. All of them need {joint.least_bytes} bytes at least."
        )
