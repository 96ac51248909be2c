"""What a scrape of many models costs: milliseconds of one core from what is known to the text.

No server and no engine: the real exposition over made-up models of Qwen2.5-7B's shape, half of
whose blocks are their own. HTTP and compression are not in it. Every number is written anew with
each scrape, whether it has changed or not; what is kept is the text of plans, so a new plan alone
makes a scrape dearer.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any, cast

from prometheus_client import CollectorRegistry

from linker_core.engine.messages import ModelBytes, ModelLoad, Snapshot
from linker_core.errors import InvalidRequestError
from linker_core.weights.architecture import DTYPE_BYTES, ModelConfig, parse_config
from linker_core.weights.keys import parse_key
from linker_core.weights.shapes import expected_tensors
from server.cli.bench.scenario import machine
from server.gateway.errors import REJECTION_REASONS
from server.metrics.admission import AdmissionMetrics
from server.metrics.engine import render_engine
from server.metrics.evictions import EvictionMetrics
from server.metrics.exposition import Exposition
from server.metrics.fleet import FleetSeries
from server.metrics.serving import ServingMetrics
from server.metrics.sharing import SharingSeries
from server.metrics.view import View
from server.onboarding.timing import STAGES
from server.registry.records import Json, ModelRecord, ModelState
from server.registry.store import Registry

_SHAPE = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584,
    "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
_TOKENS = 8  # of each model between two scrapes


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what a command line asks for.

    Raises:
        InvalidRequestError: No model, no block or no round.
    """
    if min(args.count, args.blocks, args.rounds) < 1:
        raise InvalidRequestError("--count, --blocks and --rounds take at least 1.")
    return {"machine": machine(), **measure(args.count, args.blocks, rounds=args.rounds)}


def measure(num_models: int, num_blocks: int, *, rounds: int) -> dict[str, Any]:
    """Returns milliseconds of a scrape after nothing, a request of each model, and a new plan.

    Args:
        num_models: A donor and its variants.
        num_blocks: Of each.
        rounds: How often each is done, in turn.
    """
    fleet = _Fleet(num_models, num_blocks)
    first_ms, text = fleet.scrape()
    idle: list[float] = []
    busy: list[float] = []
    planned: list[float] = []
    for _ in range(rounds):
        idle.append(fleet.scrape()[0])
        fleet.serve_everybody()
        busy.append(fleet.scrape()[0])
        fleet.plan_one_anew()
        planned.append(fleet.scrape()[0])
    return {
        "models": num_models,
        "blocks": num_blocks,
        "series": sum(not line.startswith(b"#") for line in text.splitlines()),
        "bytes": len(text),
        "first_ms": first_ms,
        "unchanged_ms": _figures(idle),
        "after_a_request_of_each_ms": _figures(busy),
        "one_planned_anew_ms": _figures(planned),
    }


def _figures(values: list[float]) -> dict[str, float]:
    return {"best": min(values), "median": median(values)}


class _Scans:
    """A registry that has every scan in memory."""

    def __init__(self, num_blocks: int) -> None:
        far = (0.01 + 1e-4 * number for number in range(num_blocks))
        blocks = [{"index": i, "cos": 1 - e, "epsilon": e} for i, e in enumerate(far)]
        self._report = {"blocks": blocks}

    def scan(self, _donor: str, _variant: str) -> Json:
        return self._report


class _Fleet:
    """Models, what is counted of them, and what exposes it."""

    def __init__(self, num_models: int, num_blocks: int) -> None:
        config = parse_config({**_SHAPE, "num_hidden_layers": num_blocks})
        names = [f"organisation/model-{number:03}" for number in range(num_models)]
        self._models = [_record(name, place, config) for place, name in enumerate(names)]
        self._configs = dict.fromkeys(names, config)
        registry = CollectorRegistry()
        self._metrics = ServingMetrics(registry, rejection_reasons=REJECTION_REASONS)
        AdmissionMetrics(registry, stages=STAGES)
        EvictionMetrics(registry)
        for name in names:
            self._metrics.add_model(name)
        sharing = SharingSeries(cast(Registry, _Scans(num_blocks)))
        self._exposition = Exposition(
            registry,
            (render_engine, FleetSeries().render, self._metrics.render, sharing.render),
            version="0",
        )
        self._num_steps = 0
        self.serve_everybody()

    def scrape(self) -> tuple[float, bytes]:
        """Returns the milliseconds of a scrape, and its text."""
        view = View(
            models=[replace(model) for model in self._models],
            snapshot=self._snapshot(),
            engine_up=True,
            engine_restarts=0,
            configs=self._configs,
        )
        started = time.thread_time()
        text = self._exposition.render(view)
        return 1e3 * (time.thread_time() - started), text

    def serve_everybody(self) -> None:
        """Serves a request of each model, so that no number of it stays what it was."""
        for model in self._models:
            meter = self._metrics.follow(model.name, num_prompt=100, arrived_s=time.monotonic())
            for number in range(_TOKENS):
                meter.came([time.monotonic()], queued_s=0.0 if number == 0 else None)
            meter.ended("length")
        self._num_steps += _TOKENS

    def plan_one_anew(self) -> None:
        """Gives one model another plan."""
        last = self._models[-1]
        assert last.plan is not None
        self._models[-1] = replace(last, plan=dict(last.plan))

    def _snapshot(self) -> Snapshot:
        names = [model.name for model in self._models]
        return Snapshot(
            models=dict.fromkeys(names, ModelBytes(logical=10**10, unique=10**9, shared=9 * 10**9)),
            load=dict.fromkeys(names, ModelLoad(running=self._num_steps % 7, waiting=1)),
            device="cpu",
            device_weight_bytes=10**11,
            device_kv_bytes=10**9,
            device_free_bytes=10**10,
            reserved_bytes=0,
            kv_usage_ratio=0.5,
            num_preemptions=0,
            batch_variants={len(names): self._num_steps},
        )


def _record(name: str, place: int, config: ModelConfig) -> ModelRecord:
    return ModelRecord(
        name=name,
        source="",
        request={},
        state=ModelState.READY,
        position=place,
        created_at=0.0,
        donor=None if place == 0 else "organisation/model-000",
        family="organisation/model-000",
        plan=_plan(place, config),
    )


def _plan(place: int, config: ModelConfig) -> Mapping[str, Any]:
    """Returns the plan of a variant with every second block to itself, as it is stored."""
    shapes = expected_tensors(config)
    own = [name for name in shapes if _is_own(name)]
    unique_bytes = DTYPE_BYTES[config.dtype] * sum(math.prod(shapes[name]) for name in own)
    num_own = len(range(0, config.num_layers, 2))
    return {
        "policy": "budget",
        "donor_fingerprint": "d",
        "variant_fingerprint": f"v{place}",
        "rungs": {name: "own" if name in own else "alias" for name in shapes},
        "own_rows": {},
        "unique_bytes": unique_bytes,
        "rung_bytes": {"alias": 0, "own": unique_bytes},
        "bits_per_weight": 8.0,
        "blocks": {"alias": config.num_layers - num_own, "residual": 0, "own": num_own},
        "price": {"kl": 0.0123, "kl_upper": 0.0145, "top1": 0.987, "ppl_ratio": 1.0012},
        "budget_kl": 0.02,
    }


def _is_own(name: str) -> bool:
    key = parse_key(name)
    assert key is not None
    return key.layer is not None and key.layer % 2 == 0
