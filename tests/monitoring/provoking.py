"""What is rare, made to happen: for every alert, that which it is there to tell of."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from server.bridge.supervisor import SupervisionLimits
from server.registry.keys import MadeKey
from server.registry.records import Json, Role
from tests.server.fake_engine import TOO_BIG, Fault
from tests.server.keyed import give_key, revoke_key
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

_PLACES = 24  # for sequences of one key: enough late ones to be more than a handful
_ALL_PLACES = 28  # the last eighth is kept for other keys
_LATE_S = 2.6  # for a first token
_STALL_S = 25.0  # then no more requests are taken; until then all that a test needs have come
_PRICE = {"kl": 0.01, "kl_upper": 0.02, "top1": 0.99, "ppl_ratio": 1.01, "tokens": 4096,
          "calibration": "", "matmul_precision": None, "encoding": None}  # fmt: skip


class Stage(NamedTuple):
    """A server of `base`, `near` and `far` over a pretended engine, whose steps are never more."""

    live: LiveServer
    state: Path
    scraper: MadeKey


@contextmanager
def stage(root: Path) -> Iterator[Stage]:
    """Runs such a server until the block ends; `root` is empty."""
    base, state = make_checkpoint(root / "base"), root / "state"
    operator, scraper = give_key(state, Role.ADMIN), give_key(state, Role.METRICS)
    with live_server(
        state,
        models={"base": base},
        root=root,
        settings={"http": {"max_inflight": _ALL_PLACES}},
        limits=SupervisionLimits(stall_s=_STALL_S),
    ) as live:
        live.client.headers["Authorization"] = f"Bearer {operator.key}"
        live.until_ready()
        for seed, name in enumerate(("near", "far")):
            source = make_variant(root / name, base, scale=0.5, seed=seed)
            answer = live.onboard(name, source, donor="base", policy="exact")
            assert answer.status_code == httpx.codes.CREATED, answer.text
        yield Stage(live, state, scraper)


def lower_budget(live: LiveServer, model: str) -> None:
    """Puts a model's plan over its budget, as nobody but a hand in the registry can."""
    plan = live.services.roster.model(model).plan
    assert plan is not None
    price: Json = plan["price"] or _PRICE

    async def amend() -> None:
        over = {**plan, "policy": "budget", "price": price, "budget_kl": price["kl_upper"] / 2}
        live.services.roster.amend(model, plan=over)

    live.call(amend())


@contextmanager
def _steps_stand_still(on: Stage) -> Iterator[None]:
    body = {"model": "base", "prompt": [Fault.WAIT, 50], "max_tokens": 100, "stream": True}
    with on.live.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # which hangs up once nobody has it
        next(lines)
        yield


@contextmanager
def _model_fails(on: Stage) -> Iterator[None]:
    source = make_variant(on.state.parent / TOO_BIG, on.state.parent / "base", scale=0.5)
    assert on.live.onboard(TOO_BIG, source, donor="base", policy="exact").is_error
    yield


@contextmanager
def _budget_is_lowered(on: Stage) -> Iterator[None]:
    lower_budget(on.live, "near")
    yield


@contextmanager
def _engine_is_stopped(on: Stage) -> Iterator[None]:
    pid = on.live.services.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    on.live.until_ready()


@contextmanager
def _all_places_are_taken(on: Stage) -> Iterator[None]:
    """Sequences wait in an engine that is stopped."""
    with ThreadPoolExecutor(_PLACES) as threads:
        with _engine_is_stopped(on):
            asked = [
                threads.submit(on.live.complete, "base", [50], max_tokens=1) for _ in range(_PLACES)
            ]
            on.live.until(lambda: on.live.services.gate._inflight.taken == _PLACES)
            yield
        assert all(answer.result().status_code == httpx.codes.OK for answer in asked)


@contextmanager
def _first_tokens_are_late(on: Stage) -> Iterator[None]:
    with _all_places_are_taken(on):
        enough = time.monotonic() + _LATE_S
        on.live.until(lambda: time.monotonic() > enough)
    yield


@contextmanager
def _requests_are_refused(on: Stage) -> Iterator[None]:
    with _all_places_are_taken(on):
        for _ in range(60):
            answer = on.live.complete("base", [50], max_tokens=1)
            assert answer.status_code == httpx.codes.TOO_MANY_REQUESTS
        yield


@contextmanager
def _sequences_fail(on: Stage) -> Iterator[None]:
    for _ in range(30):
        assert on.live.complete("base", [Fault.FAIL, 50]).is_server_error
    yield


@contextmanager
def _memory_is_taken(on: Stage) -> Iterator[None]:
    """Nearly all of it is set aside, as for a tuner."""
    client = on.live.services.engine.client
    assert client is not None
    free = int(on.live.metric('linker_device_memory_bytes{device="cpu",state="free"}'))
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with on.live.services.room.reserving(client, "test", free - 1000, what="A test"):
            begun.set()
            await ended.wait()

    held = asyncio.run_coroutine_threadsafe(hold(), on.live.loop)
    on.live.call(begun.wait())
    yield
    on.live.loop.call_soon_threadsafe(ended.set)
    held.result()


@contextmanager
def _models_do_not_fit(on: Stage) -> Iterator[None]:
    """There is room for either variant and not for both, and they are asked in turn."""
    unload = on.live.client.post("/models/unload", json={"model": "far"})
    assert unload.status_code == httpx.codes.OK
    with _memory_is_taken(on):
        for model in ("far", "near") * 6:
            answer = on.live.complete(model, [50], max_tokens=1)
            assert answer.status_code == httpx.codes.OK, answer.text
        yield


@contextmanager
def _engine_dies(on: Stage) -> Iterator[None]:
    for _ in range(3):
        on.live.until(lambda: on.live.complete("base", [50], max_tokens=1).is_success)
        assert on.live.complete("base", [Fault.DIE, 50, 51]).is_server_error
    yield


@contextmanager
def _key_is_revoked(on: Stage) -> Iterator[None]:
    revoke_key(on.state, on.scraper)
    yield


# In an order in which none raises what comes after it.
PROVOKE: Mapping[str, Callable[[Stage], AbstractContextManager[None]]] = {
    "LinkerEngineNotProgressing": _steps_stand_still,
    "LinkerModelFailed": _model_fails,
    "LinkerFidelityOverBudget": _budget_is_lowered,
    "LinkerMemoryBudgetNearlyFull": _memory_is_taken,
    "LinkerEvictionsChurning": _models_do_not_fit,
    "LinkerEngineDown": _engine_is_stopped,
    "LinkerTimeToFirstTokenFastBurn": _first_tokens_are_late,
    "LinkerOverloaded": _requests_are_refused,
    "LinkerRequestErrors": _sequences_fail,
    "LinkerEngineRestarting": _engine_dies,
    "LinkerDown": _key_is_revoked,
}
