"""What a dry run says a model needs, held against what its load takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from server.onboarding.prepare import read_text_side
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

KV_TOKENS = 16
EXACT: dict[str, Any] = {"policy": "exact"}
ALIASED: dict[str, Any] = {"policy": "thresholds", "tau_cos": 0.5, "tau_frob": 1.0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A donor, a variant that is like it, and two of which every byte is another."""
    base = make_checkpoint(tmp_path / "base")
    make_variant(tmp_path / "near", base, scale=0.01)
    for seed, name in enumerate(("far", "odd"), start=2):
        make_variant(tmp_path / name, base, scale=0.5, seed=seed)
    return tmp_path


def kv_bytes(root: Path) -> int:
    config = EngineConfig(kv_cache_tokens=KV_TOKENS)
    return kv_cache_bytes(read_text_side(root / "base").config, config)


@contextmanager
def serving(root: Path, *, budget: int) -> Iterator[LiveServer]:
    engine = {"memory_budget": budget, "kv_cache_tokens": KV_TOKENS}
    with live_server(
        root / "state",
        root=root,
        models={"base": root / "base"},
        settings={"engine": engine},
    ) as live:
        live.until_ready()
        yield live


def free_bytes(live: LiveServer) -> int:
    return int(live.metric('linker_device_memory_bytes{device="cpu",state="free"}'))


def planned(live: LiveServer, source: Path, **options: Any) -> dict[str, Any]:
    response = live.client.post("/models/plan", json={"source": str(source), **options})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def onboard(live: LiveServer, root: Path, name: str, **options: Any) -> None:
    response = live.onboard(name, root / name, **options)
    assert response.status_code == 201, response.text


def bare_config(root: Path) -> Path:
    """Returns a directory with the variants' shape and no weights."""
    folder = root / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((root / "near" / "config.json").read_bytes())
    return folder


def test_variant_of_an_heir_needs_the_base_that_has_gone(root: Path) -> None:
    whole = read_text_side(root / "base").checkpoint_bytes
    with serving(root, budget=3 * whole + kv_bytes(root)) as live:
        onboard(live, root, "far", donor="base", **EXACT)
        assert live.client.delete("/models/base", params={"rehome": True}).status_code == 200
        assert free_bytes(live) == 2 * whole
        answer = planned(live, root / "near", donor="far", **ALIASED)
        shape = planned(live, bare_config(root), donor="far", **ALIASED)
        before = free_bytes(live)
        onboard(live, root, "near", donor="far", **ALIASED)
        needed = answer["needed_bytes"]
        assert needed["base"] > 0
        assert needed["total"] == before - free_bytes(live)
        assert shape["needed_bytes"] == needed


def test_dry_run_and_load_refuse_alike_where_the_base_does_not_fit(root: Path) -> None:
    text = read_text_side(root / "base")
    outside = text.outside_blocks_bytes
    budget = 2 * text.checkpoint_bytes + kv_bytes(root) + outside
    with serving(root, budget=budget) as live:
        onboard(live, root, "far", donor="base", pin=True, **EXACT)
        assert live.client.delete("/models/base", params={"rehome": True}).status_code == 200
        onboard(live, root, "odd", donor="far", pin=True, **EXACT)
        answer = planned(live, root / "near", donor="far", **ALIASED)
        assert answer["bytes"]["unique"] <= answer["free_bytes"] == outside
        assert (answer["fits"], answer["would_evict"]) == (False, [])
        response = live.onboard("near", root / "near", donor="far", wait=False, **ALIASED)
        assert response.status_code == 507, response.text  # before the reply, without a job
        assert response.json()["error"]["code"] == "insufficient_capacity"


def test_variant_of_an_unloaded_donor_needs_the_donor_and_its_cache(root: Path) -> None:
    whole = read_text_side(root / "base").checkpoint_bytes
    with serving(root, budget=3 * whole + kv_bytes(root)) as live:
        response = live.client.post("/models/unload", json={"model": "base"})
        assert response.status_code == 200, response.text
        before = free_bytes(live)
        answer = planned(live, root / "near", donor="base", **ALIASED)
        assert answer["needed_bytes"]["donor"] == whole + kv_bytes(root)
        onboard(live, root, "near", donor="base", **ALIASED)
        assert answer["needed_bytes"]["total"] == before - free_bytes(live)
