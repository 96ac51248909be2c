"""`linker export DONOR VARIANT TARGET`: a variant as its delta to the donor, ready to ship."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from linker_core.errors import BadCheckpointError, ConflictError, InvalidRequestError
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import kind_of
from linker_core.weights.checkpoint import Identity
from linker_core.weights.fingerprint import fingerprint
from linker_core.weights.lora import is_adapter
from server.cli.checkpoints import open_checkpoint
from server.cli.plan import HOW_TO_MEASURE, add_sharing_arguments, plan_pair
from server.cli.progress import byte_progress
from server.cli.scanning import add_sample_argument
from server.cli.sizes import mib, mib_cell
from server.onboarding.encoder import Encoder
from server.onboarding.request import SHARING_OPTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("donor", type=Path, help="checkpoint directory of the donor")
    parser.add_argument(
        "variant",
        type=Path,
        help="checkpoint directory of the variant, or a PEFT LoRA folder trained on the donor",
    )
    parser.add_argument("target", type=Path, help="the folder to make, in one that exists")
    add_sharing_arguments(parser)
    add_sample_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Plans, writes the folder and prints what it takes."""
    if args.target.exists():
        raise ConflictError(
            f"{args.target} exists. Name a folder that does not, so that nothing is lost."
        )
    export = _export_adapter if is_adapter(args.variant) else _export_variant
    export(args)
    with DeltaFile.open(args.target) as delta:
        plan = delta.plan
    file_bytes = (args.target / DELTA_FILE).stat().st_size
    if args.json:
        json.dump(_answer(plan, file_bytes), sys.stdout, indent=1)
        print()
    else:
        _print_sizes(Console(), plan, file_bytes)
    return 0


@contextmanager
def _unchanged(target: Path, **paths: Path) -> Iterator[None]:
    """Removes what the block made if a checkpoint is another one at its end; keys are roles.

    Raises:
        BadCheckpointError: It is.
    """
    before = _identities(paths)
    yield
    if _identities(paths) != before:
        shutil.rmtree(target)
        raise BadCheckpointError(
            "A weight file changed between planning and the end of the export. Nothing was kept; "
            "leave the checkpoints alone meanwhile, and try again."
        )


def _identities(paths: Mapping[str, Path]) -> list[Identity]:
    identities = []
    for role, path in paths.items():
        with open_checkpoint(role, path) as checkpoint:
            identities.append(checkpoint.identity)
    return identities


def _export_variant(args: argparse.Namespace) -> None:
    with _unchanged(args.target, donor=args.donor, variant=args.variant):
        plan, _ = plan_pair(args)
        _encode(plan, args)


def _encode(plan: SharePlan, args: argparse.Namespace) -> None:
    with byte_progress("encoding") as progress:
        work = Encoder().encode(
            plan,
            donor=args.donor,
            variant=args.variant,
            target=args.target,
            on_progress=lambda _stage, done, total: progress(done, total),
        )
        asyncio.run(work)


def _export_adapter(args: argparse.Namespace) -> None:
    for option in ("policy", *SHARING_OPTIONS, *HOW_TO_MEASURE, "sample"):
        if getattr(args, option) is not None:
            raise InvalidRequestError(
                f"{option} has no meaning for an adapter: its factors are kept as they are.",
                param=option,
            )
    with _unchanged(args.target, donor=args.donor):
        _convert(args)


def _convert(args: argparse.Namespace) -> None:
    with open_checkpoint("donor", args.donor) as donor, byte_progress("hashing") as progress:
        digest = fingerprint(donor, progress=progress)
    with byte_progress("encoding") as progress:
        work = Encoder().convert(
            args.variant,
            donor=args.donor,
            donor_fingerprint=digest,
            target=args.target,
            on_progress=lambda _stage, done, total: progress(done, total),
        )
        asyncio.run(work)


def _answer(plan: SharePlan, file_bytes: int) -> dict[str, Any]:
    return {
        "checkpoint_bytes": plan.checkpoint_bytes,
        "delta_bytes": plan.unique_bytes,
        "file_bytes": file_bytes,
        "ratio": plan.unique_bytes / plan.checkpoint_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "rung_bytes": dict(plan.rung_bytes),
        "policy": plan.policy.value,
        "price": None if plan.price is None else plan.price.to_json(),
    }


def _print_sizes(console: Console, plan: SharePlan, file_bytes: int) -> None:
    tensors: dict[str, int] = {}
    for rung in plan.rungs.values():
        tensors[kind_of(rung)] = tensors.get(kind_of(rung), 0) + 1
    table = Table("rung", "tensors", "MiB")
    for kind, nbytes in sorted(plan.rung_bytes.items(), key=lambda item: item[1]):
        table.add_row(kind, str(tensors[kind]), mib_cell(nbytes))
    console.print(table)
    if plan.price is not None:
        console.print(
            f"costs {plan.price.kl:.5f} nats per token (at most {plan.price.kl_upper:.5f}) · top-1"
            f" {plan.price.top1:.2%} · perplexity ratio {plan.price.ppl_ratio:.4f}"
        )
    console.print(
        f"checkpoint {mib(plan.checkpoint_bytes)} · delta {mib(plan.unique_bytes)}"
        f" ({plan.unique_bytes / plan.checkpoint_bytes:.1%}, {plan.bits_per_weight:.2f} bits"
        f" per weight) · file {mib(file_bytes)}"
    )
