"""`linker plan`: what a pair would share, or what N variants of a shape would take."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.sharing.footprint import footprint
from linker_core.sharing.plan import Fingerprints, Policy, plan_variant
from linker_core.sharing.scan import scan
from linker_core.sharing.thresholds import load_tiers
from linker_core.weights import strict_json
from linker_core.weights.architecture import DTYPE_BYTES, parse_config
from linker_core.weights.fingerprint import fingerprint
from server.cli.checkpoints import open_pair
from server.cli.progress import byte_progress

_MIB = 2**20
POLICIES = ("auto", Policy.THRESHOLDS.value, Policy.EXACT.value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("donor", type=Path, nargs="?", help="checkpoint directory of the donor")
    parser.add_argument("variant", type=Path, nargs="?", help="checkpoint directory of the variant")
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        default="auto",
        help="thresholds: whole blocks that pass BS Eq. 3; exact: byte-identical tensors only; "
        "auto (default): thresholds",
    )
    parser.add_argument("--tau-cos", type=float, help="least cosine of a shared block (0.999)")
    parser.add_argument("--tau-frob", type=float, help="largest ε of a shared block (0.05)")
    parser.add_argument("--tier", help=f"thresholds of a known family: {', '.join(load_tiers())}")
    parser.add_argument("--config", type=Path, help="config.json: answer from shapes alone")
    parser.add_argument("--variants", type=int, help="with --config: models, the donor included")
    parser.add_argument(
        "--shared-blocks",
        type=int,
        help="with --config: blocks aliased (default: all)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="with --config (bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Plans and prints; moves nothing."""
    if args.config is not None:
        answer = _from_shapes(args)
    else:
        answer = _from_checkpoints(args)
    if args.json:
        json.dump(answer, sys.stdout, indent=1)
        print()
    else:
        _print(answer)
    return 0


def _from_shapes(args: argparse.Namespace) -> dict[str, Any]:
    for option in ("donor", "variant", "tau_cos", "tau_frob", "tier"):
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
        "single_mib": size.single_bytes / _MIB,
        "naive_mib": size.naive_bytes / _MIB,
        "linked_mib": size.linked_bytes / _MIB,
        "saved_percent": 100 * saved,
    }


def _from_checkpoints(args: argparse.Namespace) -> dict[str, Any]:
    if args.donor is None or args.variant is None:
        raise InvalidRequestError("Give DONOR and VARIANT directories, or --config and --variants.")
    for option in ("variants", "shared_blocks", "dtype"):
        if getattr(args, option) is not None:
            raise InvalidRequestError(f"{option} has no meaning without --config.")
    with open_pair(args.donor, args.variant) as (donor, variant):
        with byte_progress("scanning") as progress:
            report = scan(donor, variant, progress=progress)
        with byte_progress("hashing") as progress:
            fingerprints = Fingerprints(
                *(fingerprint(c, progress=progress) for c in (donor, variant))
            )
        plan = plan_variant(
            report,
            donor,
            variant,
            policy=Policy.THRESHOLDS if args.policy == "auto" else Policy(args.policy),
            fingerprints=fingerprints,
            tau_cos=args.tau_cos,
            tau_frob=args.tau_frob,
            tier=args.tier,
        )
    return plan.to_json()


def _print(answer: dict[str, Any]) -> None:
    console = Console()
    if "single_mib" in answer:
        console.print(
            f"one model {answer['single_mib']:.0f} MiB · separate copies {answer['naive_mib']:.0f}"
            f" MiB · linked {answer['linked_mib']:.0f} MiB · saves {answer['saved_percent']:.0f} %"
        )
        console.print("(if every variant aliases the blocks given; linker scan tells which would)")
        return
    thresholds = ""
    if answer["tau_cos"] is not None:
        thresholds = (
            f" (τ_cos {answer['tau_cos']}, τ_frob {answer['tau_frob']}: "
            f"{answer['threshold_source']})"
        )
    console.print(
        f"{answer['policy']}{thresholds}: {answer['blocks_shared']} of {answer['blocks']['total']}"
        f" blocks aliased · {answer['region']}, mean cos {answer['mean_cos']:.6f}, mean ε"
        f" {answer['mean_epsilon']:.5f}"
    )
    console.print(
        f"logical {answer['logical_bytes'] / _MIB:.1f} MiB · unique"
        f" {answer['unique_bytes'] / _MIB:.1f} MiB · saved {answer['shared_bytes'] / _MIB:.1f} MiB"
    )
