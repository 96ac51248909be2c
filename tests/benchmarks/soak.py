"""A mixed soak over HTTP: `python -m tests.benchmarks.soak --minutes 10` prints a summary in JSON.

A small family of six models with different plans is served by `linker serve`. Clients ask at
random: any length, shared prefixes, several choices, streams left midway, seeds, priorities, salts,
structured answers, bad requests. At the end every answer with one right value is asked for again,
alone, and must be the same to the bit of its log-probabilities; no page may be held; the engine's
memory must be flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from server.cli.bench.memory import private_bytes
from tests.benchmarks.memory import MIB, served
from tests.benchmarks.soak_client import Answer, Memory, ask_alone, visit
from tests.benchmarks.soak_requests import Asks
from tests.tiny import make_checkpoint, make_variant

MAX_GROWTH_MIB_PER_MINUTE = 1.0
_NUM_CLIENTS = 24
_NUM_REPEATABLE = 300
_SAMPLE_S = 0.5
_DEADLINE_S = 60.0
# Fewer pages than the clients want together: sequences wait, and some are preempted.
_SETTINGS = "engine: {kv_cache_tokens: 2048, max_num_seqs: 24, max_batch_tokens: 128}\n"
_SHARE = {"policy": "thresholds", "tau_cos": 0.0, "tau_frob": 1e6}
_OWN = {"policy": "thresholds", "tau_cos": 1.0, "tau_frob": 0.0}
_HEADS = ("lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Bytes that engine and server hold to themselves at one moment."""

    at_s: float
    engine_bytes: int
    server_bytes: int


def make_family(root: Path) -> dict[str, Mapping[str, object]]:
    """Writes a donor and five variants; returns how each one is onboarded."""
    donor = make_checkpoint(root / "base", tie=False, layers=3, hidden=64, intermediate=128)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)]
    blocks = dict.fromkeys(names, 0.05)
    make_variant(root / "aliased", donor, scale=blocks)
    make_variant(root / "heads", donor, scale=blocks | dict.fromkeys(_HEADS, 0.3), seed=2)
    make_variant(root / "exact", donor, scale=dict.fromkeys(names[:1], 0.2), seed=3)
    make_variant(root / "own", donor, scale=0.5, seed=4)
    make_variant(root / "wide", donor, scale=blocks, seed=5, added_tokens=("<|tool|>",))
    return {
        "base": {}, "aliased": _SHARE, "heads": _SHARE, "exact": {"policy": "exact"}, "own": _OWN,
        "wide": _SHARE,
    }  # fmt: skip


def soak(folder: Path, *, duration_s: float, seed: int = 0) -> dict[str, Any]:
    """Runs a soak in an empty folder and returns its summary; `problems` is empty if all is well.

    Growth is reported and not judged: short soaks see the engine warm up.
    """
    models = make_family(folder / "models")
    (folder / "settings.yaml").write_text(_SETTINGS)
    options = ("--config", str(folder / "settings.yaml"))
    with served(folder / "models", folder / "state", *options) as (process, client):
        for name, sharing in models.items():
            body = {"name": name, "source": str(folder / "models" / name), **sharing}
            donor = {} if name == "base" else {"donor": "base"}
            answer = client.post("/models", params={"wait": "true"}, json=body | donor)
            answer.raise_for_status()
        blocks = {name: client.get(f"/models/{name}").json()["blocks"] for name in models}
        asks = Asks(list(models), seed=seed, num_repeatable=_NUM_REPEATABLE)
        memory = Memory()
        url = str(client.base_url)
        samples = asyncio.run(_crowd(url, asks, memory, process, duration_s=duration_s))
        held = _until_idle(client)
        if held:
            memory.problems.append(f"{held:.4f} of the pages are held after the last request")
        compared = asyncio.run(_compare(url, memory))
        metrics = _metrics(client)
    return {
        "seconds": duration_s,
        "blocks": blocks,
        "requests": dict(memory.counts),
        "statuses": {str(status): number for status, number in sorted(memory.statuses.items())},
        "compared": compared,
        "held_pages_ratio": held,
        "preemptions": metrics["linker_num_preemptions_total"],
        "prefix_hit_ratio": metrics["linker_prefix_cache_hits_total"]
        / max(1.0, metrics["linker_prefix_cache_queries_total"]),
        "engine_mib": [round(sample.engine_bytes / MIB, 2) for sample in _thinned(samples)],
        "engine_mib_per_minute": slope(samples, "engine_bytes"),
        "server_mib_per_minute": slope(samples, "server_bytes"),
        "problems": memory.problems[:20],
    }


async def _crowd(
    url: str, asks: Asks, memory: Memory, process: psutil.Process, *, duration_s: float
) -> list[Sample]:
    until_s = asyncio.get_running_loop().time() + duration_s
    (engine,) = (child for child in process.children() if _is_engine(child))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=_DEADLINE_S, limits=limits, trust_env=False
    ) as client:
        visitors = [
            asyncio.create_task(visit(client, asks, memory, until_s=until_s))
            for _ in range(_NUM_CLIENTS)
        ]
        watching = asyncio.create_task(_watch(engine.pid, process.pid, until_s=until_s))
        await asyncio.gather(*visitors)
        samples = await watching
    if not engine.is_running():
        memory.problems.append("the engine did not live through it")
    return samples


async def _watch(engine: int, server: int, *, until_s: float) -> list[Sample]:
    clock = asyncio.get_running_loop().time
    samples: list[Sample] = []
    while clock() < until_s:
        held = private_bytes(engine), private_bytes(server)
        samples.append(Sample(at_s=clock(), engine_bytes=held[0], server_bytes=held[1]))
        await asyncio.sleep(_SAMPLE_S)
    return samples


def _is_engine(process: psutil.Process) -> bool:
    return "linker_core.engine.worker" in process.cmdline()


async def _compare(url: str, memory: Memory) -> dict[str, int]:
    """Asks for every repeatable answer once more, alone; returns what was compared."""
    wrong = 0
    async with httpx.AsyncClient(base_url=url, timeout=_DEADLINE_S, trust_env=False) as client:
        for number, (key, ask) in enumerate(memory.asks.items()):
            right = await ask_alone(client, ask, salt=f"alone {number}")
            answers = memory.whole.get(key, [])
            begun = memory.begun.get(key, [])
            if any(answer != right for answer in answers) or not all(
                _begins(answer, right) for answer in begun
            ):
                wrong += 1
                memory.problems.append(f"another answer than alone: {key[:300]}")
    greedy = sum(ask.is_greedy for ask in memory.asks.values())
    distinct = {"greedy": greedy, "seeded": len(memory.asks) - greedy}
    return {f"distinct_{kind}": number for kind, number in distinct.items()} | {"wrong": wrong}


def _begins(answer: Answer, right: Answer) -> bool:
    return all(choice.begins(right[index]) for index, choice in answer.items())


def _until_idle(client: httpx.Client) -> float:
    """Waits until nothing runs or waits; returns the share of pages that are held then."""
    give_up_at = time.monotonic() + _DEADLINE_S
    while True:
        metrics = _metrics(client)
        busy = sum(value for name, value in metrics.items() if "_num_requests_" in name)
        held = metrics["linker_kv_cache_usage_ratio"]
        if (not busy and not held) or time.monotonic() > give_up_at:
            return held
        time.sleep(0.2)


def _metrics(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def slope(samples: Sequence[Sample], field: str) -> float:
    """Returns the growth over the second half in MiB a minute, by a linear fit."""
    half = samples[len(samples) // 2 :]
    minutes = np.array([sample.at_s / 60 for sample in half])
    held = np.array([getattr(sample, field) / MIB for sample in half])
    return float(np.polyfit(minutes - minutes[0], held, 1)[0])


def _thinned(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[:: -(-len(samples) // 20)]


def main() -> None:
    """Runs a soak; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary = soak(Path(folder), duration_s=arguments.minutes * 60, seed=arguments.seed)
    if summary["engine_mib_per_minute"] > MAX_GROWTH_MIB_PER_MINUTE:
        summary["problems"].append("the engine's memory grows")
    print(json.dumps(summary, indent=1))
    sys.exit(1 if summary["problems"] else 0)


if __name__ == "__main__":
    main()
