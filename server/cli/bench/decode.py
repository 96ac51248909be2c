"""Tokens a second without HTTP: our engine beside what users would pick instead, in one run.

Every engine is a process that loads once; each round goes to all of them in turn, and those whose
turn it is not are halted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import count
from statistics import median
from typing import Any, Final

from linker_core.sharing.rungs import Residual
from linker_core.weights.checkpoint import Checkpoint
from server.cli.bench import peers
from server.cli.bench.contenders import Launch, running, streams_of
from server.cli.bench.figures import Round, paired_ratio, summary
from server.cli.bench.fleet import measure_fleet
from server.cli.bench.read_speed import MemoryReader
from server.cli.bench.scenario import (
    FLEET,
    OURS,
    PROMPT_TOKENS,
    ROUNDED,
    Settings,
    compared,
    memory_figures,
    tell,
)
from server.cli.bench.synthetic import Kinship
from server.cli.bench.synthetic_delta import write_delta_once

_BATCHES: Final = (1, 8, 16)
_LONG_PROMPT_TOKENS: Final = 512
_NUM_KIN: Final = 8
_ONE_VARIANT: Final = "one variant"
_ALIASED: Final = "aliased"
_OWN_COPIES: Final = "own copies"
_DELTAS: Final = "deltas"
_DELTA_RUNG: Final = Residual(bits=4, group=64)


def measure_single(settings: Settings) -> dict[str, Any]:
    """One variant: batches, a long prompt, and the time to read the weights once."""
    (base,) = settings.family(Kinship.EQUAL, 1)
    with Checkpoint.open(base) as checkpoint:
        reader = MemoryReader(checkpoint.nbytes)
    launches = [
        peers.linker([base]),
        peers.linker([base], name=ROUNDED, matmul_precision="medium"),
    ]
    if settings.peers is not None:
        for dtype in settings.dtypes:
            launches.append(peers.vllm(settings.peers, base, dtype=dtype))
            launches.append(peers.transformers(settings.peers, base, dtype=dtype))
    works = {f"batch {batch}": (batch, PROMPT_TOKENS, settings.tokens) for batch in _BATCHES}
    works["prefill"] = (1, _LONG_PROMPT_TOKENS, 1)
    found: dict[str, dict[str, list[Round]]] = {work: defaultdict(list) for work in works}
    reads: list[float] = []
    seeds = count(1)  # no prompt begins like one before: nothing is found in a prefix cache
    with running(launches) as contenders:
        for number in range(settings.rounds):
            reads.append(reader.seconds())
            for work, (batch, prompt_tokens, max_tokens) in works.items():
                streams = streams_of(batch, prompt_tokens=prompt_tokens, seed=next(seeds))
                for contender in contenders:
                    with contender.awake():
                        got = contender.run(streams, max_tokens=max_tokens)
                    found[work][contender.name].append(got)
                    tell(number, work, contender.name, got)
        memory = {each.name: memory_figures(each.peak) for each in contenders}
    return {
        "commands": {launch.name: str(launch) for launch in launches},
        "memory": memory,
        **{work: compared(rounds) for work, rounds in found.items()},
        "read": _beside_reads(found["batch 1"][OURS], reads, reader.nbytes),
    }


def _beside_reads(rounds: Sequence[Round], reads: Sequence[float], nbytes: int) -> dict[str, Any]:
    """Returns what a token takes alone, in times that the weights' bytes take to read."""
    steps = [median(each.gaps_s) for each in rounds]
    pairs = zip(steps, reads, strict=True)
    return {
        "read_ms": median(reads) * 1e3,
        "gb_per_s": nbytes / median(reads) / 1e9,
        "step_ms": median(steps) * 1e3,
        "steps_over_reads": median(step / read for step, read in pairs),
    }


def measure_kin(settings: Settings) -> dict[str, Any]:
    """Eight variants with a stream each, beside eight streams of one variant; ours alone."""
    equal = settings.family(Kinship.EQUAL, _NUM_KIN)
    own_head = settings.family(Kinship.OWN_HEAD, _NUM_KIN)
    launch = peers.linker([*equal, *own_head[1:]])
    works: dict[str, Sequence[int]] = {
        _ONE_VARIANT: (0,),
        Kinship.EQUAL: range(_NUM_KIN),
        Kinship.OWN_HEAD: (0, *range(_NUM_KIN, 2 * _NUM_KIN - 1)),
    }
    found, memory = _measure_works(launch, works, settings)
    one = found[_ONE_VARIANT]
    return {
        "commands": {launch.name: str(launch)},
        "memory": {launch.name: memory},
        "figures": {work: summary(rounds) for work, rounds in found.items()},
        "ratios": {
            work: paired_ratio(rounds, one, of=lambda each: each.tokens_per_s)
            for work, rounds in found.items()
        },
    }


def measure_residual(settings: Settings) -> dict[str, Any]:
    """Eight variants with a stream each: as deltas in 4 bits, as own copies, and aliased; ours."""
    base, near = settings.family(Kinship.NEAR, 2)
    delta = write_delta_once(base, near, _DELTA_RUNG)
    others = _NUM_KIN - 1
    launch = peers.linker([base, *[base] * others, *[near] * others, *[delta] * others])
    works = {
        name: (0, *range(1 + place * others, 1 + (place + 1) * others))
        for place, name in enumerate((_ALIASED, _OWN_COPIES, _DELTAS))
    }
    found, memory = _measure_works(launch, works, settings)
    pairs = {"over own copies": _OWN_COPIES, "over aliased": _ALIASED}
    return {
        "commands": {launch.name: str(launch)},
        "memory": {launch.name: memory},
        "figures": {work: summary(rounds) for work, rounds in found.items()},
        "ratios": {
            name: paired_ratio(found[_DELTAS], found[other], of=lambda each: each.tokens_per_s)
            for name, other in pairs.items()
        },
    }


def _measure_works(
    launch: Launch, works: Mapping[str, Sequence[int]], settings: Settings
) -> tuple[dict[str, list[Round]], dict[str, float]]:
    """Returns the rounds of eight streams over each work's models in turn, and our memory."""
    found: dict[str, list[Round]] = {work: [] for work in works}
    seeds = count(1)
    with running([launch]) as (contender,):
        for number in range(settings.rounds):
            for work, models in works.items():
                streams = streams_of(
                    _NUM_KIN, prompt_tokens=PROMPT_TOKENS, seed=next(seeds), models=models
                )
                with contender.awake():
                    got = contender.run(streams, max_tokens=settings.tokens)
                found[work].append(got)
                tell(number, work, contender.name, got)
        return found, memory_figures(contender.peak)


SCENARIOS: Final = {
    "single": measure_single,
    "kin": measure_kin,
    "residual": measure_residual,
    FLEET: measure_fleet,
}
