"""The Gram pass's rate beside a streaming read of the same files, a stack with its SVD, and memory.

All in one run over the page cache, so that the ratios mean something on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from linker_core.errors import InvalidRequestError
from server.cli.bench.memory import private_bytes
from server.cli.bench.pair import write_family
from server.cli.bench.scan import read_all
from server.onboarding.processes import worker_environment

# Layers of Qwen2.5-0.5B: 180 MB a model in bfloat16, many times what a cache holds.
SHAPE: Final = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 6,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip
_FIRST_LAYER: Final = "model.layers.0.*proj.weight"
_SAMPLE_S = 0.002


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line names.

    Raises:
        InvalidRequestError: A base without a fine-tune.
    """
    models: list[Path] = args.models
    if len(models) == 1:
        raise InvalidRequestError("Give BASE and VARIANTs, or nothing to measure made-up ones.")
    with _family(models) as (base, *variants):
        return measure(base, variants, rounds=args.rounds)


def measure(base: Path, variants: Sequence[Path], *, rounds: int) -> dict[str, Any]:
    """Reads a family and sums its deltas in turn; the best of the rounds counts.

    Args:
        base: A checkpoint that this process may map: nobody else writes to it.
        variants: Its fine-tunes.
        rounds: How often each is done.
    """
    named = {str(number): path for number, path in enumerate(variants)}
    seconds: dict[str, list[float]] = {}
    cpu_seconds: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[[StudiedFamily], object]) -> None:
        # Opened anew each time, since a second pass over a map finds its pages in place.
        with StudiedFamily.open(base, named) as family:
            started, cpu_started = time.perf_counter(), time.process_time()
            work(family)
            seconds.setdefault(what, []).append(time.perf_counter() - started)
            cpu_seconds.setdefault(what, []).append(time.process_time() - cpu_started)

    for _ in range(rounds):
        timed("read", lambda family: read_all(*family.checkpoints))
        timed("gram", lambda family: _sum_all(family, mapped=True))
        timed("buffered_gram", lambda family: _sum_all(family, mapped=False))
    with StudiedFamily.open(base, named) as family:
        total_bytes = sum(checkpoint.nbytes for checkpoint in family.checkpoints)
    best, cpu = (
        {what: min(times) for what, times in each.items()} for each in (seconds, cpu_seconds)
    )
    ways = {way: _way(way, (base, *variants)) for way in ("streamed", "stacked")}
    shares = [ways[way].pop("shares") for way in ways]
    return {
        "num_variants": len(variants),
        "total_bytes": total_bytes,
        "num_cores": len(os.sched_getaffinity(0)),
        "seconds": best,
        "gram_over_read": best["read"] / best["gram"],
        "buffered_gram_over_read": best["read"] / best["buffered_gram"],
        "cpu_seconds": cpu,  # of all cores; on a busy machine their ratio says more
        "gram_over_read_cpu": cpu["read"] / cpu["gram"],
        "first_layer": ways,
        "streamed_over_stacked": ways["stacked"]["seconds"] / ways["streamed"]["seconds"],
        "streamed_over_stacked_cpu": (
            ways["stacked"]["cpu_seconds"] / ways["streamed"]["cpu_seconds"]
        ),
        "largest_gap_of_shares": float(np.abs(np.subtract(*shares)).max()),
    }


def _sum_all(family: StudiedFamily, *, mapped: bool) -> None:
    """Sums every tensor, so that what is summed is what is read."""
    for gram in gram_pass(family, tuple(family.base.tensors), mapped=mapped):
        assert gram.base_square >= 0.0


def _way(way: str, models: Sequence[Path]) -> dict[str, Any]:
    """Studies the first layer in a process of its own; adds its private memory's peak."""
    command = [sys.executable, "-P", "-m", "server.cli.bench.gram_ways", way, _FIRST_LAYER]
    with subprocess.Popen(
        [*command, *map(str, models)], stdout=subprocess.PIPE, env=worker_environment()
    ) as process:
        assert process.stdout is not None
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(process.stdout.read)
            peak_bytes = 0
            while not answer.done():
                peak_bytes = max(peak_bytes, private_bytes(process.pid))
                time.sleep(_SAMPLE_S)
    found: dict[str, Any] = json.loads(answer.result())
    return found | {"peak_private_mib": peak_bytes / 2**20}


@contextmanager
def _family(models: Sequence[Path]) -> Iterator[Sequence[Path]]:
    """Yields the checkpoints that were named, or new ones for the time being."""
    if models:
        yield models
        return
    with tempfile.TemporaryDirectory() as folder:
        print("making a family of checkpoints up", file=sys.stderr)
        yield write_family(Path(folder), SHAPE, num_variants=5)
