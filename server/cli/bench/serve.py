"""Tokens a second over HTTP: our server beside those that users would pick instead, in one run."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final

from linker_core.errors import InvalidRequestError, LinkerError
from server.cli.bench import servers
from server.cli.bench.figures import Round, paired_ratio, summary
from server.cli.bench.http_streams import complete
from server.cli.bench.scenario import (
    FLEET,
    OURS,
    PROMPT_TOKENS,
    Settings,
    compared,
    memory_figures,
    tell,
)
from server.cli.bench.servers import Server, ServerLaunch
from server.cli.bench.synthetic import Kinship

_NUM_STREAMS: Final = 8
_NUM_MODELS: Final = 4
_SOLO: Final = (0,) * _NUM_STREAMS
_INTERLEAVED: Final = tuple(number % _NUM_MODELS for number in range(_NUM_STREAMS))
_MIB: Final = 2**20


def measure_single(settings: Settings) -> dict[str, Any]:
    """Eight streams of one variant, beside one server at a time: one alone may fill the memory."""
    models = settings.family(Kinship.EQUAL, 1)
    runs: dict[str, Any] = {}
    seeds = count(1)  # no prompt comes twice: nothing is found in a prefix cache
    with _ours(models) as ours:
        for kind in _transformers(models, settings, dtypes=settings.dtypes):
            with servers.serving(kind) as theirs:
                runs[kind.launch.name] = _take_turns([ours, theirs], seeds, settings)
        if not runs:
            runs["alone"] = _take_turns([ours], seeds, settings)
    return {"runs": runs}


def _take_turns(
    running: Sequence[Server], seeds: Iterator[int], settings: Settings
) -> dict[str, Any]:
    """Returns what each server gave for streams of its first model, with commands and memory."""
    found: dict[str, list[Round]] = defaultdict(list)
    for server in running:
        server.warm_up()
    for number in range(settings.rounds):
        for server in running:
            name = server.kind.launch.name
            found[name].append(_round([server], _SOLO, next(seeds), settings))
            tell(number, "single", name, found[name][-1])
    return {
        "commands": _commands(running),
        "memory": {each.kind.launch.name: memory_figures(each.peak) for each in running},
        **compared(found),
    }


def measure_variants(settings: Settings) -> dict[str, Any]:
    """Two streams of each of four variants with own embeddings, beside eight streams of one.

    `transformers serve` gets the same four with its defaults and with small caches; what ends it
    is its result.
    """
    models = settings.family(Kinship.OWN_HEAD, _NUM_MODELS)
    found: dict[str, list[Round]] = {"one variant": [], "four variants": []}
    seeds = count(1)
    with _ours(models) as server:
        server.warm_up()
        for number in range(settings.rounds):
            for name, streams in zip(found, (_SOLO, _INTERLEAVED), strict=True):
                found[name].append(_round([server], streams, next(seeds), settings))
                tell(number, "variants", name, found[name][-1])
        memory = memory_figures(server.peak)
        commands = _commands([server])
    result: dict[str, Any] = {
        "commands": commands,
        "memory": {OURS: memory},
        "figures": {name: summary(rounds) for name, rounds in found.items()},
        "ratio": paired_ratio(
            found["four variants"], found["one variant"], of=lambda each: each.tokens_per_s
        ),
        "peers": {},
    }
    for kind in _transformers(models, settings, dtypes=settings.dtypes[:1]):
        result["commands"][kind.launch.name] = str(kind.launch)
        result["peers"][kind.launch.name] = _survive(kind, settings)
    return result


def measure_fleet(settings: Settings) -> dict[str, Any]:
    """Two streams of each of four variants, beside four servers of vLLM that run at once.

    Raises:
        InvalidRequestError: No peers.
    """
    if settings.peers is None:
        raise InvalidRequestError("The scenario fleet compares with peers: leave --alone out.")
    models = settings.family(Kinship.OWN_HEAD, _NUM_MODELS)
    result: dict[str, Any] = {"commands": {}, "runs": {}}
    for dtype in settings.dtypes:
        kinds = [servers.vllm(settings.peers, model, dtype=dtype) for model in models]
        found: dict[str, list[Round]] = defaultdict(list)
        seeds = count(1)
        with _ours(models) as ours, ExitStack() as stack:
            fleet = [stack.enter_context(servers.serving(kind)) for kind in kinds]
            for server in (ours, *fleet):
                server.warm_up()
            for number in range(settings.rounds):
                for name, group in ((OURS, [ours]), (kinds[0].launch.name, fleet)):
                    found[name].append(_round(group, _INTERLEAVED, next(seeds), settings))
                    tell(number, "fleet", name, found[name][-1])
            own = ours.peak.anonymous_bytes
            others = sum(each.peak.anonymous_bytes for each in fleet)
            result["commands"] |= _commands([ours, *fleet])
        result["runs"][dtype] = {
            **compared(found),
            "memory_mib": {OURS: own / _MIB, "peers": others / _MIB},
            "memory_ratio": own / others,
        }
    return result


def _round(group: Sequence[Server], streams: Sequence[int], seed: int, settings: Settings) -> Round:
    """Sends streams to one server with several models, or each to the server of its model."""
    with ExitStack() as awake:
        for server in group:
            awake.enter_context(server.awake())
        requests = [
            request
            for index, server in enumerate(group)
            for request in server.requests(
                streams if len(group) == 1 else [0] * streams.count(index),
                prompt_tokens=PROMPT_TOKENS,
                max_tokens=settings.tokens,
                seed=_NUM_MODELS * seed + index,
            )
        ]
        return complete(requests)


def _survive(kind: ServerLaunch, settings: Settings) -> dict[str, Any]:
    """Returns what a server gave for the interleaved streams, or what ended it."""
    found: list[Round] = []
    seeds = count(1)
    error = None
    with servers.serving(kind) as server:
        try:
            server.warm_up()
            for number in range(settings.rounds):
                found.append(_round([server], _INTERLEAVED, next(seeds), settings))
                tell(number, "variants", kind.launch.name, found[-1])
        except LinkerError as failure:
            error = failure.message
        figures = summary(found) if found else {}
        return {"error": error, "memory": memory_figures(server.peak), **figures}


@contextmanager
def _ours(models: Sequence[Path]) -> Iterator[Server]:
    with (
        tempfile.TemporaryDirectory() as state,
        servers.serving(servers.linker(models, Path(state))) as server,
    ):
        yield server


def _transformers(
    models: Sequence[Path], settings: Settings, *, dtypes: Sequence[str]
) -> Iterator[ServerLaunch]:
    """Yields `transformers serve` with its defaults and with a cache of our size."""
    if settings.peers is None:
        return
    for dtype in dtypes:
        for flags in ((), ("--cb-num-blocks", "64", "--cb-max-batch-tokens", "256")):
            yield servers.transformers(settings.peers, models, dtype=dtype, flags=flags)


def _commands(running: Sequence[Server]) -> dict[str, str]:
    return {each.kind.launch.name: str(each.kind.launch) for each in running}


SCENARIOS: Final = {
    "single": measure_single,
    "variants": measure_variants,
    FLEET: measure_fleet,
}
