"""What `linker bench` measures on this machine, a module each.

A benchmark compares within one run. Those of a pair of checkpoints have `measure(donor, variant)`,
which returns plain JSON values, and the `SHAPE` of a pair that is made up where none is given;
those of engines and servers have `SCENARIOS`, each of which measures by itself; those of the
gateway, of a scrape and of a family have `run(args)`.
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

PAIRS = {
    "scan": "sums and digests beside a streaming read of the same files",
    "admission": "scan and load beside from_pretrained, stage by stage",
    "encode": "deltas on several rungs beside from_pretrained",
    "tune": "sensitivities and prices, in forward passes of the variant",
}
RACES = {
    "decode": "tokens a second of the engine beside vLLM and transformers",
    "serve": "the same over HTTP, beside the servers of both",
    "study": "what streams feel of a study of a family beside them, and its memory",
    "residency": "what eviction frees, reloads, and what streams feel of an admission",
}
GATEWAY = {"gateway": "what the gateway adds to requests, with an engine that needs no time"}
SCRAPE = {"scrape": "what reading the metrics of many models costs"}
FAMILY = {"gram": "inner products of a family's deltas beside a streaming read, and a stack's SVD"}
BENCHMARKS = PAIRS | RACES | GATEWAY | SCRAPE | FAMILY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, text in BENCHMARKS.items():
        benchmark = benchmarks.add_parser(name, help=text, description=text, allow_abbrev=False)
        benchmark.add_argument("--json", action="store_true", help="print JSON")
        if name in RACES:
            _add_race_arguments(benchmark)
            continue
        if name in GATEWAY:
            _add_gateway_arguments(benchmark)
            continue
        if name in SCRAPE:
            _add_scrape_arguments(benchmark)
            continue
        if name in FAMILY:
            _add_family_arguments(benchmark)
            continue
        made_up = "(default: a made-up pair)"
        benchmark.add_argument("donor", type=Path, nargs="?", help=f"the donor's path {made_up}")
        benchmark.add_argument("variant", type=Path, nargs="?", help="the variant's path")


def _add_race_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", nargs="+", metavar="SCENARIO", help="not all of them")
    add("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    add("--tokens", type=int, default=64, help="of an answer (%(default)s)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), help="of the peers (both)")
    add("--models", type=Path, help="where made-up models are kept (~/.cache/linker/bench)")
    add("--peers", type=Path, help="the peers' environments (~/.cache/linker/peers)")
    add("--alone", action="store_true", help="without peers")
    add("--results", type=Path, help="a JSON file that takes each scenario once it is measured")


def _add_gateway_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", nargs="+", metavar="SCENARIO", help="latency, throughput, stalls, memory")
    add("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    add("--scale", type=float, default=1.0, help="of the work in a round (%(default)s)")
    add("--models", type=Path, help="where the made-up model is kept (~/.cache/linker/bench)")
    add("--before", type=Path, help="source of another version that takes turns with this one")


def _add_scrape_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--count", type=int, default=50, help="models (%(default)s)")
    add("--blocks", type=int, default=28, help="of each model (%(default)s)")
    add("--rounds", type=int, default=50, help="scrapes of each kind (%(default)s)")


def _add_family_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="*", type=Path, help="BASE VARIANT … (default: a made-up base and five)")
    add("--rounds", type=int, default=7, help="of each (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; stdout holds one JSON document under --json."""
    # Only the benchmark asked for is imported: most of them bring torch along.
    module = importlib.import_module(f"{__name__}.{args.benchmark}")
    figures: Mapping[str, Any]
    if args.benchmark in RACES:
        scenario = importlib.import_module(f"{__name__}.scenario")
        figures = scenario.run_scenarios(module.SCENARIOS, args)
    elif args.benchmark in GATEWAY | SCRAPE | FAMILY:
        figures = module.run(args)
    else:
        with _pair(args, module.SHAPE) as (donor, variant):
            figures = module.measure(donor, variant)
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
        if name == "commands":
            continue  # too long for a table; they were told when they were started
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield prefix + name, shown
