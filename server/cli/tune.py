"""`linker tune DONOR VARIANT`: what plans of a pair cost, measured, and the one to choose."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import get_args

from rich.console import Console

from linker_core.config import MatmulPrecision
from linker_core.sharing.plan import count_weights
from linker_core.sharing.report import ScanReport
from linker_core.tuning.request import (
    DEFAULT_BUDGET_KL,
    SELF_CALIBRATION,
    TuneGoal,
    TuneRequest,
)
from linker_core.tuning.result import TuneResult
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint
from server.cli.checkpoints import open_pair
from server.cli.frontier import print_frontier
from server.cli.progress import byte_progress
from server.cli.recipe import add_recipe_arguments, refuse_recipe_arguments, run_recipe
from server.cli.scanning import scan_apart
from server.onboarding.processes import run_worker
from server.onboarding.tuner import TUNE_COMMAND
from server.settings import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("donor", type=Path, help="checkpoint directory of the donor")
    parser.add_argument("variant", type=Path, help="checkpoint directory of the variant")
    add_goal_arguments(parser)
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_goal_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what is aimed at, and on which text and device it is measured."""
    parser.add_argument(
        "--budget-kl",
        type=float,
        help=f"what sharing may cost, in nats per response token ({DEFAULT_BUDGET_KL})",
    )
    parser.add_argument(
        "--max-bytes",
        type=size_argument,
        help="instead: what the variant may hold to itself; 536870912, 512M, 8G",
    )
    parser.add_argument(
        "--calibration",
        help="text to measure on: a file of JSON lines beside the shipped dialogues, or self for "
        "the variant's own answers",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to measure (cpu)")
    parser.add_argument(
        "--matmul-precision",
        choices=get_args(MatmulPrecision),
        help="of the server whose prices these are: linker serve's option (highest)",
    )


def run(args: argparse.Namespace) -> int:
    """Scans, tunes and prints; stdout holds one JSON document under --json."""
    if args.recipe is not None:
        return run_recipe(args)
    refuse_recipe_arguments(args)
    if args.budget_kl is None and args.max_bytes is None:
        args.budget_kl = DEFAULT_BUDGET_KL
    goal = TuneGoal(budget_kl=args.budget_kl, max_bytes=args.max_bytes)
    goal.check()
    report = scan_apart(args.donor, args.variant)
    with open_pair(args.donor, args.variant) as (donor, variant):
        with byte_progress("hashing the donor") as progress:
            digest = fingerprint(donor, progress=progress)
        result = tune_pair(donor, variant, report, args, goal=goal, donor_fingerprint=digest)
        num_weights = count_weights(variant)
    if args.json:
        json.dump(result.to_json(), sys.stdout, indent=1)
        print()
        return 0
    console = Console()
    print_frontier(console, result, checkpoint_bytes=variant.nbytes, num_weights=num_weights)
    console.print(
        f"{result.reference_tokens} response tokens · {result.forward_passes:.1f} forward passes"
        f" of the variant in {result.seconds:.1f} s"
    )
    return 0


def tune_pair(
    donor: Checkpoint,
    variant: Checkpoint,
    report: ScanReport,
    args: argparse.Namespace,
    *,
    goal: TuneGoal,
    donor_fingerprint: str,
) -> TuneResult:
    """Runs the tuner in a process of its own; `args` are those of `add_goal_arguments`.

    Raises:
        LinkerError: A goal out of reach, a text of no use, or damaged checkpoints.
    """
    given = args.calibration in (None, SELF_CALIBRATION)
    request = TuneRequest(
        donor=str(donor.path),
        variant=str(variant.path),
        report=report.to_json(),
        donor_fingerprint=donor_fingerprint,
        goal=goal,
        calibration=args.calibration if given else str(Path(args.calibration).resolve()),
        device=args.device or "cpu",
        matmul_precision=args.matmul_precision or "highest",
    )
    with byte_progress("tuning") as progress:
        work = run_worker(
            TUNE_COMMAND,
            request=request.to_json(),
            on_progress=lambda _stage, done, total: progress(done, total),
        )
        result = asyncio.run(work)
    return TuneResult.from_json(result["tune"])


def size_argument(text: str) -> int:
    """Reads a size of a command line: bytes, or 512M, 8G."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    assert isinstance(size, int)
    return size
