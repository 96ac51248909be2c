"""Eviction and return on the real engine: exact bytes, and the same answers to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.engine.messages import Snapshot
from server.onboarding.prepare import read_text_side
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

KV_TOKENS = 256
PROMPT = "Once upon a time a model left the device"
VARIANTS = ("near", "far", "odd")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The real engine with room for a donor and two of its three variants, whatever they share."""
    root = tmp_path_factory.mktemp("real")
    base = make_checkpoint(root / "base")
    for seed, name in enumerate(VARIANTS):
        make_variant(root / name, base, scale=0.01 if name == "near" else 0.5, seed=seed)
    text = read_text_side(base)
    cache_bytes = kv_cache_bytes(text.config, EngineConfig(kv_cache_tokens=KV_TOKENS))
    budget = 3 * text.checkpoint_bytes + cache_bytes
    settings = {"engine": {"kv_cache_tokens": KV_TOKENS, "memory_budget": budget}}
    with live_server(
        root / "state",
        models={"base": base},
        root=root,
        engine_command=None,
        settings=settings,
    ) as server:
        server.until_ready()
        yield server


def onboard(live: LiveServer, name: str) -> None:
    root = live.services.settings.models.root
    assert root is not None
    response = live.onboard(name, root / name, donor="base", policy="exact")
    assert response.status_code in (200, 201), response.text


def answer(live: LiveServer, name: str) -> dict[str, Any]:
    """Returns a greedy answer with the log-probability of every token of prompt and answer."""
    response = live.complete(
        name, PROMPT, temperature=0, max_tokens=12, logprobs=3, echo=True, return_token_ids=True
    )
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def snapshot(live: LiveServer) -> Snapshot:
    found = live.services.engine.snapshot
    assert found is not None
    return found


def test_eviction_frees_exactly_the_unique_bytes_and_a_return_changes_no_bit(
    live: LiveServer,
) -> None:
    onboard(live, "far")
    before, others = answer(live, "far"), answer(live, "base")
    full = snapshot(live)
    unique = full.models["far"].unique
    assert unique > 0
    live.call(live.services.evictions.unload("far"))
    without = snapshot(live)
    assert without.device_free_bytes - full.device_free_bytes == unique
    assert full.device_weight_bytes - without.device_weight_bytes == unique
    assert answer(live, "base") == others
    assert answer(live, "far") == before  # brought back by the request
    again = snapshot(live)
    assert again.device_free_bytes == full.device_free_bytes
    assert again.models["far"] == full.models["far"]


def test_models_that_do_not_fit_together_take_turns_and_answer_as_ever(live: LiveServer) -> None:
    for name in VARIANTS:
        onboard(live, name)
    first = {name: answer(live, name) for name in VARIANTS}
    assert len({tuple(one["token_ids"]) for one in first.values()}) > 1
    for name in VARIANTS * 2:
        assert answer(live, name) == first[name]
        report = snapshot(live)
        held = sum(model.unique for model in report.models.values())
        assert held == report.device_weight_bytes
        assert len(report.models) < 1 + len(VARIANTS)  # never all of them
    assert live.metric('linker_evictions_total{reason="capacity"}') >= len(VARIANTS)


def test_traffic_on_more_models_than_fit_changes_no_answer(live: LiveServer) -> None:
    for name in VARIANTS:
        onboard(live, name)
    # Tokens alone: last bits of logits may follow the batch that a row was computed in.
    first = {name: answer(live, name)["token_ids"] for name in VARIANTS}

    def ask(turn: int) -> bool:
        name = VARIANTS[turn * 7 % 3]
        return bool(answer(live, name)["token_ids"] == first[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(48)))
    assert live.services.on_demand.num_waiting == 0
    assert len(snapshot(live).models) < 1 + len(VARIANTS)


def test_the_whole_family_leaves_with_its_cache_and_comes_back(live: LiveServer) -> None:
    onboard(live, "far")
    before = answer(live, "far")
    for name in (*VARIANTS, "base"):
        if live.services.roster.find(name) is not None:
            live.call(live.services.evictions.unload(name))
    empty = snapshot(live)
    assert empty.models == {}
    assert empty.device_weight_bytes == empty.device_kv_bytes == 0
    assert answer(live, "far") == before
    assert set(snapshot(live).models) == {"base", "far"}
