"""Residency over HTTP: eviction for room, return on demand, leases of running answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from server.onboarding.prepare import read_text_side
from server.registry.records import ModelState
from tests.server.fake_engine import Fault
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

KV_TOKENS = 16
VARIANTS = ("near", "far", "odd")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A donor `base` and three variants of it that hold the same number of bytes."""
    base = make_checkpoint(tmp_path / "base")
    for seed, name in enumerate(VARIANTS):
        make_variant(tmp_path / name, base, scale=0.5, seed=seed)
    return tmp_path


def budget(root: Path, *, variants: int) -> int:
    """Returns room for the donor and so many of its variants, each of which shares nothing."""
    text = read_text_side(root / "base")
    config = EngineConfig(kv_cache_tokens=KV_TOKENS)
    return (1 + variants) * text.checkpoint_bytes + kv_cache_bytes(text.config, config)


@contextmanager
def serving(root: Path, *, variants: int, **models: Any) -> Iterator[LiveServer]:
    """A server with room for so many variants, in which all of them have been onboarded."""
    settings = {
        "engine": {"memory_budget": budget(root, variants=variants), "kv_cache_tokens": KV_TOKENS},
        "models": {"root": root, "serve": [{"name": "base", "path": root / "base"}], **models},
    }
    with live_server(root / "state", root=root, settings=settings) as live:
        live.until_ready()
        for name in VARIANTS:
            response = live.onboard(name, root / name, donor="base")
            assert response.status_code == 201, response.text
        yield live


def resident(live: LiveServer) -> set[str]:
    return {model.name for model in live.services.catalog.models()}


def evictions(live: LiveServer, reason: str) -> float:
    return live.metric(f'linker_evictions_total{{reason="{reason}"}}')


def num_loads(root: Path, name: str) -> int:
    return len((root / name / "loads.log").read_text().splitlines())


def answer(live: LiveServer, name: str) -> None:
    response = live.complete(name, [9, 10, 11], max_tokens=3)
    assert response.status_code == 200, response.text


@contextmanager
def in_use(live: LiveServer, name: str) -> Iterator[None]:
    """A stream that its client leaves when the block ends, and that does not end before."""
    body = {"model": name, "prompt": [Fault.MUTE, 50], "max_tokens": 50, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        yield


@contextmanager
def slow_stream(live: LiveServer, name: str, *, tokens: int) -> Iterator[Iterator[str]]:
    """A stream whose first token is there when the block begins."""
    body = {
        "model": name,
        "prompt": [Fault.SLOW, 50],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    with live.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        yield lines


def num_tokens(lines: Iterator[str]) -> int:
    """Reads a stream to its end, which is a good one."""
    read = list(lines)
    assert read[-1] == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: ")) for line in read[:-1]]
    return sum(len(piece["choices"][0].get("token_ids", ())) for piece in pieces)


def test_an_evicted_model_answers_and_an_idle_one_leaves_for_it(root: Path) -> None:
    with serving(root, variants=2) as live:
        # The third found no room, so the first one left.
        assert resident(live) == {"base", "far", "odd"}
        assert live.client.get("/models/near").json()["state"] == "unloaded"
        assert evictions(live, "capacity") == 1
        assert evictions(live, "idle") == evictions(live, "request") == 0
        answer(live, "near")
        assert "near" in resident(live)
        assert len(resident(live)) == 3
        assert evictions(live, "capacity") == 2
        for name in VARIANTS * 2:
            answer(live, name)
        snapshot = live.services.engine.snapshot
        assert snapshot is not None
        held = sum(held.unique for held in snapshot.models.values())
        kept = held + snapshot.device_kv_bytes
        assert kept + snapshot.device_free_bytes == budget(root, variants=2)


def test_many_requests_for_an_evicted_model_load_it_once(root: Path) -> None:
    with serving(root, variants=2) as live:
        before = num_loads(root, "near")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: answer(live, "near"), range(8)))
        assert num_loads(root, "near") == before + 1


def test_requests_for_more_models_than_fit_all_get_their_answers(root: Path) -> None:
    with serving(root, variants=1) as live, ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda turn: answer(live, VARIANTS[turn % 3]), range(30)))
        assert len(resident(live)) == 2


def test_a_stream_keeps_its_model_and_who_needs_the_room_waits(root: Path) -> None:
    with serving(root, variants=1) as live:
        answer(live, "near")
        with slow_stream(live, "near", tokens=20) as lines, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(answer, live, "far")
            assert num_tokens(lines) == 19
            waiting.result()
        assert resident(live) == {"base", "far"}


def test_unloading_lets_a_stream_end_and_the_next_request_brings_the_model_back(
    root: Path,
) -> None:
    with serving(root, variants=3) as live:
        with slow_stream(live, "near", tokens=20) as lines, ThreadPoolExecutor(2) as pool:
            unloading = pool.submit(live.call, live.services.evictions.unload("near"))
            live.until(lambda: "near" not in resident(live))
            later = pool.submit(answer, live, "near")
            assert not unloading.done()
            assert num_tokens(lines) == 19
            unloading.result()
            later.result()
        assert evictions(live, "request") == 1
        assert "near" in resident(live)


def test_a_client_that_leaves_while_its_model_is_loaded_harms_nobody(root: Path) -> None:
    with serving(root, variants=1) as live, ThreadPoolExecutor(1) as pool:
        answer(live, "near")
        with in_use(live, "near"):
            staying = pool.submit(answer, live, "far")
            body = {"model": "far", "prompt": [9], "max_tokens": 1, "stream": True}
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{live.url}/v1/completions", json=body, timeout=0.2)
            live.until(lambda: live.services.on_demand.num_waiting == 1)
            assert not staying.done()
        staying.result()
        live.until(lambda: not live.services.catalog.num_leases("far"))


def test_what_cannot_be_answered_brings_nothing_back(root: Path) -> None:
    with serving(root, variants=2) as live:
        before = num_loads(root, "near")
        response = live.complete("near", [9], max_tokens=10_000)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert live.complete("near", "").status_code == 400
        assert num_loads(root, "near") == before
        assert "near" not in resident(live)


def test_what_fits_beside_nothing_that_has_to_stay_is_507_with_the_figures(root: Path) -> None:
    with serving(root, variants=1) as live:

        async def pin() -> None:
            live.services.roster.amend("odd", pinned=True)

        live.call(pin())
        response = live.complete("near", [9])
        assert response.status_code == 507
        error = response.json()["error"]
        assert error["code"] == "insufficient_capacity"
        assert "would give 0" in error["message"]
        assert resident(live) == {"base", "odd"}


def test_room_that_stays_taken_is_503_with_when_to_try_again(root: Path) -> None:
    with serving(root, variants=1, load_timeout_s=0.5) as live:
        answer(live, "near")
        with in_use(live, "near"):
            response = live.complete("far", [9])
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
        live.until(lambda: live.complete("far", [9], max_tokens=1).status_code == 200)


def test_more_requests_than_may_wait_are_429(root: Path) -> None:
    with serving(root, variants=1, load_queue=1) as live, ThreadPoolExecutor(1) as pool:
        answer(live, "near")
        with in_use(live, "near"):
            waiting = pool.submit(answer, live, "far")
            live.until(lambda: live.services.on_demand.num_waiting == 1)
            response = live.complete("odd", [9])
            assert response.status_code == 429
            assert int(response.headers["Retry-After"]) >= 1
        waiting.result()


def test_idle_models_leave_and_come_back(root: Path) -> None:
    with serving(root, variants=3, keep_alive="0.1s") as live:
        # The donor leaves last; it may have come and gone with each of the variants.
        live.until(lambda: resident(live) == set() and evictions(live, "idle") >= 4)
        before = num_loads(root, "base")
        answer(live, "near")
        assert num_loads(root, "base") == before + 1  # it needs its donor


def test_the_engines_death_and_return_leave_every_model_servable(root: Path) -> None:
    with serving(root, variants=2) as live:
        assert live.complete("far", [Fault.DIE, 50], max_tokens=50).status_code == 503
        live.until_ready()
        for name in VARIANTS:
            answer(live, name)


def test_eviction_reasons_are_there_from_the_start(server: LiveServer) -> None:
    assert [evictions(server, reason) for reason in ("capacity", "idle", "request")] == [0, 0, 0]


def test_load_and_unload_race_with_requests_loses_no_answer(root: Path) -> None:
    with serving(root, variants=2) as live:
        stop = threading.Event()

        def unload() -> None:
            while not stop.is_set():
                for name in VARIANTS:
                    if live.services.roster.model(name).state is ModelState.READY:
                        live.call(live.services.evictions.unload(name))

        def ask(turn: int) -> None:
            answer(live, VARIANTS[turn % 3])

        with ThreadPoolExecutor(7) as pool:
            unloading = pool.submit(unload)
            try:
                list(pool.map(ask, range(60)))
            finally:
                stop.set()
            unloading.result()
