"""`linker scan DONOR VARIANT`: cos and ε of every block, and the region they put the pair in."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from linker_core.sharing.report import ScanReport
from linker_core.sharing.scan import scan
from linker_core.sharing.thresholds import suggest_tier
from server.cli.checkpoints import open_pair
from server.cli.progress import byte_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("donor", type=Path, help="checkpoint directory of the donor")
    parser.add_argument("variant", type=Path, help="checkpoint directory of the variant")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run(args: argparse.Namespace) -> int:
    """Scans and prints; stdout holds one JSON document under --json."""
    with (
        open_pair(args.donor, args.variant) as (donor, variant),
        byte_progress("scanning") as progress,
    ):
        report = scan(donor, variant, progress=progress)
        suggested = suggest_tier(donor.config)
    if args.json:
        json.dump(report.to_json(), sys.stdout, indent=1)
        print()
        return 0
    _print(report, suggested)
    return 0


def _print(report: ScanReport, suggested_tier: str | None) -> None:
    table = Table("block", "cos (BS Eq. 1)", "ε (BS Eq. 2)", "farthest sub-parameter")
    for block in report.blocks:
        name, sums = max(block.params.items(), key=lambda item: item[1].epsilon)
        table.add_row(
            str(block.index),
            f"{block.cos:.6f}",
            f"{block.epsilon:.5f}",
            f"{name} (ε {sums.epsilon:.4f})",
        )
    console = Console()
    console.print(table)
    rate = report.bytes_read / max(report.scan_seconds, 1e-9) / 1e9
    console.print(
        f"mean cos {report.mean_cos:.6f}, mean ε {report.mean_epsilon:.5f}: [b]{report.region}[/b]"
        f" · {report.bytes_read / 2**20:.0f} MiB in {report.scan_seconds:.2f} s ({rate:.1f} GB/s)"
    )
    if suggested_tier:
        console.print(f"The shape suggests --tier {suggested_tier}; a shape alone proves nothing.")
