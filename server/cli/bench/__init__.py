"""What `linker bench` measures on this machine, a module each with `measure(donor, variant)`.

A benchmark compares within one run; `measure` returns plain JSON values.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BENCHMARKS = {
    "scan": "sums and digests beside a streaming read of the same files",
    "admission": "scan and load beside from_pretrained, stage by stage",
    "tune": "sensitivities and prices, in forward passes of the variant",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    what = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), help=what)
    parser.add_argument("donor", type=Path, help="checkpoint directory of the donor")
    parser.add_argument("variant", type=Path, help="checkpoint directory of the variant")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; stdout holds one JSON document under --json."""
    # Only the benchmark asked for is imported: most of them bring torch along.
    module = importlib.import_module(f"{__name__}.{args.benchmark}")
    figures: Mapping[str, Any] = module.measure(args.donor, args.variant)
    if args.json:
        json.dump(figures, sys.stdout, indent=1)
        print()
        return 0
    table = Table("figure", "value")
    for name, value in _flat(figures):
        table.add_row(name, value)
    Console().print(table)
    return 0


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields every value of nested figures under its dotted name."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield prefix + name, shown
