"""Policy budget with nothing replaced: scan, tuner, engine, on models of a few layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

PROMPT = "Once upon a time"
GENEROUS = 0.05  # nats; `near` costs less even if all its blocks are the donor's


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("priced")
    base = make_checkpoint(root / "base", tie=False)
    make_variant(root / "near", base, scale=0.01)
    make_variant(root / "far", base, scale=0.5, seed=2)
    return root


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(
        tmp_path_factory.mktemp("state"),
        models={"base": root / "base"},
        root=root,
        engine_command=None,
        settings={
            "engine": {"kv_cache_tokens": 2048, "memory_budget": 1 << 30},
            "sharing": {"policy": "budget"},
        },
    ) as live:
        live.until_ready()
        yield live


def text(server: LiveServer, model: str) -> str:
    response = server.complete(model, PROMPT, temperature=0, max_tokens=16, ignore_eos=True)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_near_variant_shares_within_its_budget_and_far_one_is_compressed(
    server: LiveServer, root: Path
) -> None:
    near = server.onboard("near", root / "near", budget_kl=GENEROUS).json()
    price = near["plan"]["price"]
    assert 0 < price["kl"] <= price["kl_upper"] <= GENEROUS
    assert price["tokens"] >= 4000
    assert near["bytes"]["unique"] < 0.5 * near["bytes"]["logical"]
    far = server.onboard("far", root / "far", donor="base", budget_kl=GENEROUS).json()
    assert far["plan"]["region"] == "outside"  # of the neighbourhood: no weight is the donor's
    assert far["blocks"]["alias"] == 0
    assert 0 < far["plan"]["price"]["kl_upper"] <= GENEROUS
    exact = server.onboard("exact", root / "far", donor="base", policy="exact").json()
    assert far["bytes"]["unique"] < exact["bytes"]["unique"]
    assert len(text(server, "far")) > 0
    seconds = server.client.get("/models/jobs").json()["data"][1]["result"]["seconds"]
    assert all(seconds[stage] > 0 for stage in ("open", "hash", "scan", "tune", "encode", "ready"))


def test_dry_run_foretells_bytes_and_price(server: LiveServer, root: Path) -> None:
    body = {"source": str(root / "near"), "budget_kl": 0.02}
    response = server.client.post("/models/plan", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    card = server.onboard("foretold", root / "near", budget_kl=0.02).json()
    assert answer["price"] == card["plan"]["price"]
    assert answer["bytes"]["unique"] == card["bytes"]["unique"]
    assert min(point["unique_bytes"] for point in answer["frontier"]) <= card["bytes"]["unique"]


def test_reserved_memory_is_free_again(server: LiveServer, root: Path) -> None:
    """Every reservation of this module's tuners has been given back."""
    free = 'linker_device_memory_bytes{device="cpu",state="free"}'
    other = make_variant(root / "other", root / "base", scale=0.01, seed=5)
    before = server.metric(free)
    assert server.client.post("/models/plan", json={"source": str(other)}).status_code == 200
    server.until(lambda: server.metric(free) == before)


def test_size_that_nothing_reaches_is_refused(server: LiveServer, root: Path) -> None:
    response = server.onboard("tiny", root / "far", donor="base", max_bytes=10)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_bytes"
