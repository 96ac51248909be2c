"""What `linker bench` measures on this machine, a module each with `measure` and `SHAPE`.

A benchmark compares within one run; `measure(donor, variant)` returns plain JSON values. Where no
checkpoints are given, a pair of the shape is made up and deleted again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from linker_core.errors import InvalidRequestError

BENCHMARKS = {
    "scan": "sums and digests beside a streaming read of the same files",
    "admission": "scan and load beside from_pretrained, stage by stage",
    "tune": "sensitivities and prices, in forward passes of the variant",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    what = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), help=what)
    made_up = "(default: a made-up pair)"
    parser.add_argument("donor", type=Path, nargs="?", help=f"the donor's directory {made_up}")
    parser.add_argument("variant", type=Path, nargs="?", help="the variant's directory")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; stdout holds one JSON document under --json."""
    # Only the benchmark asked for is imported: most of them bring torch along.
    module = importlib.import_module(f"{__name__}.{args.benchmark}")
    with _pair(args, module.SHAPE) as (donor, variant):
        figures: Mapping[str, Any] = module.measure(donor, variant)
    if args.json:
        json.dump(figures, sys.stdout, indent=1)
        print()
        return 0
    table = Table("figure", "value")
    for name, value in _flat(figures):
        table.add_row(name, value)
    Console().print(table)
    return 0


@contextmanager
def _pair(args: argparse.Namespace, shape: Mapping[str, Any]) -> Iterator[tuple[Path, Path]]:
    """Yields the checkpoints that were named, or new ones of a shape for the time being.

    Raises:
        InvalidRequestError: A donor without a variant.
    """
    if args.donor is not None and args.variant is not None:
        yield args.donor, args.variant
        return
    if args.donor is not None:
        raise InvalidRequestError("Give DONOR and VARIANT, or neither to measure a made-up pair.")
    pair = importlib.import_module(f"{__name__}.pair")
    with tempfile.TemporaryDirectory() as folder:
        print("making a pair of checkpoints up", file=sys.stderr)
        yield pair.write_pair(Path(folder), shape)


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields every value of nested figures under its dotted name."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield prefix + name, shown
