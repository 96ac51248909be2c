"""What each part of `linker bench gateway` measures, with what is asked of it beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import numpy as np
import uvloop

from server.cli.bench.gateway_abuse import abuse
from server.cli.bench.gateway_load import at_once, open_loop
from server.cli.bench.gateway_requests import KINDS, alternating, chat, counted_tokens, streams
from server.cli.bench.gateway_servers import MAX_SEQUENCES, Cores, Target, floor

_REQUESTS_PER_S: Final = 200.0
_NUM_CONNECTIONS: Final = 50
_NUM_REQUESTS: Final = 400
_NUM_STREAMS: Final = 64
_STREAM_TOKENS: Final = 512
_STEPS_PER_S: Final = 80
_STALL_TOKENS: Final = 240
_NUM_ABUSES: Final = 1000
_MIB: Final = 2**20
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: Turns of each contender.
        scale: Of the amount of work in a round; 1 unless somebody is in a hurry.
        before: The source of another version that takes turns with this one.
    """

    rounds: int = 5
    scale: float = 1.0
    before: Path | None = None

    def scaled(self, amount: int) -> int:
        """Returns an amount of work, at least 2."""
        return max(2, round(amount * self.scale))


def measure_latency(versions: Sequence[Target], plan: Plan, cores: Cores) -> dict[str, Any]:
    """Requests that come at random, half of them streamed, beside the same bytes without us.

    What is added is the percentile of the gateway less that of `tcp`, a loop on the same core that
    parses nothing: HTTP, threads, both ways to the engine and its process count as the gateway's.
    """
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    cpu: dict[str, float] = defaultdict(float)
    num_requests = plan.scaled(_NUM_REQUESTS)
    with ExitStack() as stack:
        floors = [
            stack.enter_context(floor(kind, _answers(versions[0]), cores))
            for kind in ("tcp", "uvicorn")
        ]
        for number in range(plan.rounds):
            for target in (*versions, *floors):
                before = target.cpu_s()
                load = open_loop(
                    target.port,
                    [alternating(place) for place in range(num_requests)],
                    num_connections=_NUM_CONNECTIONS,
                    rate=_REQUESTS_PER_S,
                    seed=number,
                )
                for place, each in enumerate(run_load(load)):
                    kind = KINDS[place % 2]
                    times[target.name][kind].append(each.done_at - each.asked_at)
                cpu[target.name] += target.cpu_s() - before
    figures: dict[str, Any] = {
        name: {
            **{kind: _percentiles_ms(values) for kind, values in kinds.items()},
            "cpu_ms_per_request": 1e3 * cpu[name] / (plan.rounds * num_requests),
        }
        for name, kinds in times.items()
    }
    bars = {}
    for kind in KINDS:
        for percentile, bar in (("p50", 1.0), ("p99", 5.0)):
            added = figures["gateway"][kind][percentile] - figures["tcp"][kind][percentile]
            bars[f"{kind} {percentile} added, ms"] = _at_most(added, bar)
    return {**figures, "bars": bars}


def measure_throughput(versions: Sequence[Target], plan: Plan, _cores: Cores) -> dict[str, Any]:
    """Streams whose tokens are all there at once: how many a second come through one core."""
    rates: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    num_tokens = plan.scaled(_STREAM_TOKENS)
    for _ in range(plan.rounds):
        for target in versions:
            requests = streams(_NUM_STREAMS, max_tokens=num_tokens)
            before = target.cpu_s()
            exchanges = run_load(at_once(target.port, requests))
            cpu_s = target.cpu_s() - before
            total = counted_tokens(exchanges, max_tokens=num_tokens)
            seconds = max(e.done_at for e in exchanges) - min(e.asked_at for e in exchanges)
            rates[target.name].append(total / seconds)
            costs[target.name].append(1e6 * cpu_s / total)
    return {
        **{
            name: {"tokens_per_s": median(rates[name]), "cpu_us_per_token": median(costs[name])}
            for name in rates
        },
        "bars": {"streamed tokens a second": _at_least(median(rates["gateway"]), 20_000.0)},
    }


def measure_stalls(versions: Sequence[Target], plan: Plan, _cores: Cores) -> dict[str, Any]:
    """As many streams as are admitted, at a steady pace and with all tokens at once."""
    gaps: dict[str, list[float]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    num_tokens = plan.scaled(_STALL_TOKENS)
    for _ in range(plan.rounds):
        for target in versions:
            for pace in (_STEPS_PER_S, None):
                name = target.name + (" paced" if pace else " at once")
                requests = streams(MAX_SEQUENCES, max_tokens=num_tokens, steps_per_s=pace)
                before = target.cpu_s()
                exchanges = run_load(at_once(target.port, requests))
                total = counted_tokens(exchanges, max_tokens=num_tokens)
                costs[name].append(1e6 * (target.cpu_s() - before) / total)
                seconds = max(e.done_at for e in exchanges) - min(e.first_at for e in exchanges)
                gaps[name].append(max(e.longest_gap_s for e in exchanges))
                rates[name].append(total / seconds)
    return {
        **{
            name: {
                "longest_gap_ms": 1e3 * max(gaps[name]),
                "tokens_per_s": median(rates[name]),
                "cpu_us_per_token": median(costs[name]),
            }
            for name in gaps
        },
        "bars": {
            f"longest gap {pace}, ms": _at_most(1e3 * max(gaps[f"gateway {pace}"]), 250.0)
            for pace in ("paced", "at once")
        },
    }


def measure_memory(versions: Sequence[Target], plan: Plan, _cores: Cores) -> dict[str, Any]:
    """Requests that no honest client sends: what of them stays in the server's memory."""
    figures: dict[str, Any] = {}
    for target in versions:
        held: list[int] = []
        for number in range(2 * plan.rounds):
            run_load(abuse(target.port, plan.scaled(_NUM_ABUSES), seed=number))
            held.append(target.anonymous_bytes())
        late = held[len(held) // 2 - 1 :]  # by then every pool has its size
        slope = float(np.polyfit(range(len(late)), late, 1)[0]) if len(late) > 1 else 0.0
        per_1000 = slope / plan.scaled(_NUM_ABUSES) * 1000 / _MIB
        figures[target.name] = {
            "growth_mib_per_1000": per_1000,
            "held_mib": [nbytes / _MIB for nbytes in held],
        }
    growth = figures["gateway"]["growth_mib_per_1000"]
    return {**figures, "bars": {"growth per 1,000 requests, MiB": _at_most(growth, 1.0)}}


Scenario = Callable[[Sequence[Target], Plan, Cores], dict[str, Any]]
SCENARIOS: Final[Mapping[str, Scenario]] = {
    "latency": measure_latency,
    "throughput": measure_throughput,
    "stalls": measure_stalls,
    "memory": measure_memory,
}


def run_load(work: Coroutine[Any, Any, _Value]) -> _Value:
    """Runs load in a loop of its own."""
    return uvloop.run(work)


def _answers(target: Target) -> dict[str, Any]:
    """Returns what the gateway answers, for others to answer the same."""
    whole, streamed = run_load(at_once(target.port, [chat(kind, 0) for kind in KINDS]))
    return {
        "whole": bytes(whole.body).decode(),
        "events": [event.decode() for event in streamed.events],
    }


def _percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    found = np.percentile(np.array(seconds) * 1e3, (50, 95, 99)).tolist()
    return dict(zip(("p50", "p95", "p99"), found, strict=True))


def _at_most(value: float, bar: float) -> dict[str, Any]:
    return {"value": value, "bar": f"<= {bar:g}", "verdict": "pass" if value <= bar else "MISS"}


def _at_least(value: float, bar: float) -> dict[str, Any]:
    return {"value": value, "bar": f">= {bar:g}", "verdict": "pass" if value >= bar else "MISS"}
