"""This project's engine without its server: every command at once, then steps until all is done."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from linker_core.config import EngineConfig
from linker_core.engine.engine import Engine
from linker_core.engine.messages import (
    Event,
    LoadFailed,
    LoadModel,
    RequestFailed,
    SamplingParams,
    StepOutput,
    Submit,
)
from linker_core.errors import from_record
from linker_core.lifeline import die_with_parent
from linker_core.sharing.delta import DeltaFile, open_weights
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_donor, plan_variant
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint
from server.cli.bench.runners.channel import RunRound


def load(settings: dict[str, Any]) -> RunRound:
    """Loads `settings["models"]`; the first is the donor of what the others have equal to it.

    A delta folder is a model, too.
    """
    die_with_parent()
    engine = Engine(EngineConfig(matmul_precision=settings["matmul_precision"]))
    donor, *variants = map(Path, settings["models"])
    for number, path in enumerate((donor, *variants)):
        engine.handle(_load_command(str(number), path, donor if number else None))
        for _ in _events(engine):
            pass  # one after another, as a server onboards them
    numbers = itertools.count()

    def run_round(streams: list[dict[str, Any]], max_tokens: int) -> list[list[float]]:
        # No stop ids: every answer has as many tokens as it may.
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        times: dict[str, list[float]] = {}
        for stream in streams:
            name = str(next(numbers))
            times[name] = []
            engine.handle(
                Submit(
                    request_id=name,
                    model=str(stream["model"]),
                    prompt_ids=tuple(stream["prompt_ids"]),
                    sampling=sampling,
                )
            )
        for event in _events(engine):
            if isinstance(event, StepOutput):
                now = time.perf_counter()
                for token in event.tokens:
                    times[token.request_id].append(now)
        return list(times.values())

    return run_round


def _load_command(name: str, path: Path, donor: Path | None) -> LoadModel:
    with open_weights(path) as weights:
        return LoadModel(
            model=name,
            path=str(path),
            identity=weights.identity,
            config=weights.config,
            plan=weights.plan if isinstance(weights, DeltaFile) else _plan(weights, donor),
            donor=None if donor is None else "0",
            max_model_len=None,
        )


def _plan(checkpoint: Checkpoint, donor: Path | None) -> SharePlan:
    """Returns a plan that shares what is byte-equal, and nothing else."""
    if donor is None:
        return plan_donor(checkpoint, fingerprint=_fingerprint(checkpoint.path))
    with Checkpoint.open(donor) as base:
        return plan_variant(
            scan(base, checkpoint),
            base,
            checkpoint,
            policy=Policy.EXACT,
            fingerprints=Fingerprints(donor=_fingerprint(donor), variant=str(checkpoint.path)),
        )


@cache
def _fingerprint(path: Path) -> str:
    with Checkpoint.open(path) as checkpoint:
        return fingerprint(checkpoint)


def _events(engine: Engine) -> Iterator[Event]:
    """Steps the engine until nothing is left to do.

    Raises:
        LinkerError: What failed.
    """
    while engine.has_work:
        events: Sequence[Event] = engine.step()
        for event in events:
            if isinstance(event, LoadFailed | RequestFailed):
                raise from_record(dict(event.error))
            yield event
