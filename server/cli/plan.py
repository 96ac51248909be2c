"""`linker plan`: what a pair would share, or what N variants of a shape would take."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.sharing.footprint import footprint
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.report import ScanReport
from linker_core.tuning.result import TuneResult
from linker_core.weights import strict_json
from linker_core.weights.architecture import DTYPE_BYTES, parse_config
from linker_core.weights.fingerprint import fingerprint
from server.cli.budget import MemoryBudget, memory_budget
from server.cli.checkpoints import open_pair
from server.cli.fit import add_fit_arguments, plan_jointly, print_joint_plan
from server.cli.frontier import print_frontier, rung_mix
from server.cli.progress import byte_progress
from server.cli.scanning import (
    add_sample_argument,
    add_threshold_arguments,
    scan_apart,
    scan_sample,
)
from server.cli.sizes import MIB, mib
from server.cli.tune import add_goal_arguments, size_argument, tune_pair
from server.onboarding.planning import (
    OpenPair,
    check_budget,
    draft_plan,
    may_be_measured,
    tuned_plan,
    tuning_goal,
    untuned_plan,
)
from server.onboarding.request import (
    SHARING_OPTIONS,
    OnboardRequest,
    check_sharing,
    resolve_sharing,
)
from server.settings import POLICIES, SharingSettings

OF_SHAPES = ("variants", "shared_blocks", "dtype")
HOW_TO_MEASURE = ("calibration", "device", "matmul_precision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("donor", type=Path, nargs="?", help="checkpoint directory of the donor")
    parser.add_argument(
        "variant",
        type=Path,
        nargs="*",
        help="checkpoint directory of the variant; of several with --fit",
    )
    add_fit_arguments(parser)
    add_sharing_arguments(parser)
    add_sample_argument(parser)
    parser.add_argument(
        "--memory-budget",
        type=size_argument,
        metavar="SIZE",
        help="what `linker serve` would get for weights and pages (512M, 8G): says whether donor, "
        "pages and variant fit",
    )
    parser.add_argument("--config", type=Path, help="config.json: answer from shapes alone")
    parser.add_argument("--variants", type=int, help="with --config: models, the donor included")
    parser.add_argument(
        "--shared-blocks",
        type=int,
        help="with --config: blocks aliased (default: all)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="with --config (bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_sharing_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `plan_pair` takes besides DONOR, VARIANT and `--sample`."""
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        help="budget (default): fewest bytes whose measured cost stays within --budget-kl; bytes: "
        "lowest cost within --max-bytes; thresholds: whole blocks that pass BS Eq. 3, implied by "
        "--tau-cos and --tier; exact: byte-identical tensors only",
    )
    add_goal_arguments(parser)
    add_threshold_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Plans and prints; moves nothing."""
    variants: list[Path] = args.variant
    args.variant = variants[0] if variants else None
    if args.fit is not None:
        return _run_fit(args, variants)
    if args.config is not None:
        _show(args, size := _from_shapes(args), lambda console: _print_size(console, size))
        return 0
    if args.donor is None or len(variants) != 1:
        raise InvalidRequestError(
            "Give DONOR and VARIANT directories, several VARIANTs with --fit, or --config and "
            "--variants."
        )
    for option in OF_SHAPES:
        if getattr(args, option) is not None:
            raise InvalidRequestError(f"{option} has no meaning without --config.")
    budget = memory_budget(args)
    plan, tuned = plan_pair(args)
    points = None if tuned is None else [point.to_json() for point in tuned.frontier]
    room = {"fits": None} if budget is None else budget.to_json(plan.unique_bytes)
    answer = plan.to_json() | {"frontier": points} | room
    _show(args, answer, lambda console: _print_plan(console, plan, tuned, budget))
    return 0


def _run_fit(args: argparse.Namespace, variants: Sequence[Path]) -> int:
    """Plans several variants for one memory."""
    of_one = ("policy", *SHARING_OPTIONS, "sample", "memory_budget")
    for option in (*of_one, *OF_SHAPES):
        if getattr(args, option) is not None:
            raise InvalidRequestError(f"{option} has no meaning with --fit.", param=option)
    if args.donor is None:
        raise InvalidRequestError("--fit needs DONOR and one or more VARIANTs, each once.")
    joint = plan_jointly(args, variants)
    _show(args, joint.to_json(), lambda console: print_joint_plan(console, joint))
    return 0


def _show(
    args: argparse.Namespace, answer: Mapping[str, Any], write: Callable[[Console], None]
) -> None:
    """Prints an answer as JSON or as `write` does it."""
    if args.json:
        json.dump(answer, sys.stdout, indent=1)
        print()
    else:
        write(Console())


def _from_shapes(args: argparse.Namespace) -> dict[str, Any]:
    of_weights = ("kv", *HOW_TO_MEASURE, "sample", "memory_budget", *SHARING_OPTIONS)
    for option in ("donor", "variant", "policy", *of_weights):
        if getattr(args, option) is not None:
            raise InvalidRequestError(
                f"{option} has no meaning with --config: shapes have no weights."
            )
    if args.variants is None:
        raise InvalidRequestError("--config needs --variants N, the donor included.")
    try:
        record = strict_json.parse(args.config.read_bytes())
    except (OSError, ValueError) as error:
        raise BadCheckpointError(f"{args.config}: cannot be read as JSON: {error}.") from error
    if not isinstance(record, dict):
        raise BadCheckpointError(f"{args.config}: holds no JSON object.")
    config = parse_config(record, source=str(args.config))
    size = footprint(
        config,
        num_variants=args.variants,
        shared_blocks=args.shared_blocks,
        dtype=args.dtype or "bfloat16",
    )
    saved = 1 - size.linked_bytes / size.naive_bytes
    return {
        "single_mib": size.single_bytes / MIB,
        "naive_mib": size.naive_bytes / MIB,
        "linked_mib": size.linked_bytes / MIB,
        "saved_percent": 100 * saved,
    }


def plan_pair(args: argparse.Namespace) -> tuple[SharePlan, TuneResult | None]:
    """Scans a pair, and tunes it where its policy measures.

    Args:
        args: DONOR, VARIANT and the options of `add_sharing_arguments` and `add_sample_argument`.

    Returns:
        The plan, and what the tuner found if it was asked.

    Raises:
        LinkerError: Options that contradict each other, damaged files, or a goal out of reach.
    """
    request = OnboardRequest(name="", source="", **resolve_sharing(vars(args), SharingSettings()))
    check_sharing(request)
    for option in HOW_TO_MEASURE:
        if getattr(args, option) is not None and not may_be_measured(request):
            raise InvalidRequestError(
                f"--{option.replace('_', '-')} says how to measure, and policy {request.policy} "
                "measures nothing here; leave it out, or name a --budget-kl above 0.",
                param=option,
            )
    report = _scan(args, request)
    with open_pair(args.donor, args.variant) as (donor, variant):
        with byte_progress("hashing") as progress:
            fingerprints = Fingerprints(
                *(fingerprint(c, progress=progress) for c in (donor, variant))
            )
        pair = OpenPair(donor=donor, variant=variant, report=report, fingerprints=fingerprints)
        draft = draft_plan(request, pair)
        goal = tuning_goal(request, report, draft)
        if goal is None:
            return untuned_plan(request, draft), None
        tuned = tune_pair(
            donor, variant, report, args, goal=goal, donor_fingerprint=fingerprints.donor
        )
        plan = tuned_plan(request, pair, tuned)
        check_budget(plan)
        return plan, tuned


def _scan(args: argparse.Namespace, request: OnboardRequest) -> ScanReport:
    """Scans the whole pair, or the sample asked for, which only thresholds can do with."""
    if args.sample is None:
        return scan_apart(args.donor, args.variant)
    if request.policy != Policy.THRESHOLDS or request.budget_kl is not None:
        raise InvalidRequestError(
            "A sample of rows decides about thresholds alone: leave --sample out, or name "
            "--policy thresholds and no budget.",
            param="sample",
        )
    return scan_sample(
        args.donor,
        args.variant,
        fraction=args.sample,
        tau_cos=request.tau_cos,
        tau_frob=request.tau_frob,
        tier=request.tier,
    )


def _print_size(console: Console, size: Mapping[str, float]) -> None:
    console.print(
        f"one model {size['single_mib']:.1f} MiB · separate copies {size['naive_mib']:.1f}"
        f" MiB · linked {size['linked_mib']:.1f} MiB · saves {size['saved_percent']:.0f} %"
    )
    console.print("(if every variant aliases the blocks given; linker scan tells which would)")


def _print_plan(
    console: Console, plan: SharePlan, tuned: TuneResult | None, budget: MemoryBudget | None
) -> None:
    if tuned is not None:
        print_frontier(
            console,
            tuned,
            checkpoint_bytes=plan.checkpoint_bytes,
            num_weights=plan.num_weights,
        )
    thresholds = ""
    if plan.tau_cos is not None:
        thresholds = f" (τ_cos {plan.tau_cos}, τ_frob {plan.tau_frob}: {plan.threshold_source})"
    console.print(
        f"{plan.policy}{thresholds}: {plan.blocks.alias} of {plan.blocks.total} blocks aliased ·"
        f" {plan.region}, mean cos {plan.mean_cos:.6f}, mean ε {plan.mean_epsilon:.5f}"
    )
    if plan.price is not None:
        console.print(
            f"costs {plan.price.kl:.5f} nats per token (at most {plan.price.kl_upper:.5f}) · top-1"
            f" {plan.price.top1:.2%} · perplexity ratio {plan.price.ppl_ratio:.4f}"
        )
    console.print(
        f"logical {mib(plan.logical_bytes)} · unique {mib(plan.unique_bytes)}"
        f" · saved {mib(plan.shared_bytes)}"
    )
    console.print(f"{plan.bits_per_weight:.2f} bits a weight: {rung_mix(plan.rung_bytes)}")
    if budget is not None:
        console.print(budget.verdict(plan.unique_bytes))
