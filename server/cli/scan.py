"""`linker scan DONOR VARIANT`: cos and ε of every block, and the region they put the pair in."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from linker_core.errors import InvalidRequestError
from linker_core.sharing.report import BlockScan, Interval, ScanReport
from linker_core.sharing.thresholds import suggest_tier
from linker_core.weights.checkpoint import Checkpoint
from server.cli.scanning import (
    add_sample_argument,
    add_threshold_arguments,
    scan_apart,
    scan_sample,
)
from server.cli.sizes import mib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("donor", type=Path, help="checkpoint directory of the donor")
    parser.add_argument("variant", type=Path, help="checkpoint directory of the variant")
    add_sample_argument(parser)
    add_threshold_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run(args: argparse.Namespace) -> int:
    """Scans and prints; stdout holds one JSON document under --json."""
    thresholds = {name: getattr(args, name) for name in ("tau_cos", "tau_frob", "tier")}
    if args.sample is not None:
        report = scan_sample(args.donor, args.variant, fraction=args.sample, **thresholds)
    else:
        for name, value in thresholds.items():
            if value is not None:
                raise InvalidRequestError(f"{name} has no meaning without --sample.", param=name)
        report = scan_apart(args.donor, args.variant)
    if args.json:
        json.dump(report.to_json(), sys.stdout, indent=1)
        print()
        return 0
    with Checkpoint.open(args.donor) as donor:
        _print(report, suggest_tier(donor.config))
    return 0


def _print(report: ScanReport, suggested_tier: str | None) -> None:
    table = Table("block", "cos (BS Eq. 1)", "ε (BS Eq. 2)", "farthest sub-parameter")
    for block in report.blocks:
        name, sums = max(block.params.items(), key=lambda item: item[1].epsilon)
        table.add_row(str(block.index), *_cos_and_epsilon(block), f"{name} (ε {sums.epsilon:.4f})")
    console = Console()
    console.print(table)
    rate = report.bytes_read / max(report.scan_seconds, 1e-9) / 1e9
    console.print(
        f"mean cos {report.mean_cos:.6f}, mean ε {report.mean_epsilon:.5f}: [b]{report.region}[/b]"
        f" · {mib(report.bytes_read)} in {report.scan_seconds:.2f} s ({rate:.1f} GB/s)"
    )
    if report.sample is not None:
        console.print(
            f"Sampled at {report.sample.fraction:g}; bounds at a confidence of "
            f"{report.sample.level:g} each; blocks read whole: "
            f"{', '.join(map(str, report.sample.whole_blocks)) or 'none'}. Finiteness was checked "
            "only in what was read."
        )
    if suggested_tier:
        console.print(f"The shape suggests --tier {suggested_tier}; a shape alone proves nothing.")


def _cos_and_epsilon(block: BlockScan) -> tuple[str, str]:
    if block.bounds is None:
        return f"{block.cos:.6f}", f"{block.epsilon:.5f}"
    cos, epsilon = block.bounds.cos, block.bounds.epsilon
    return f"{block.cos:.6f}{_range(cos, 6)}", f"{block.epsilon:.5f}{_range(epsilon, 5)}"


def _range(interval: Interval, digits: int) -> str:
    return f" ({interval.low:.{digits}f} to {interval.high:.{digits}f})"
