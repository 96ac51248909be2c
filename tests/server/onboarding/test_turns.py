"""Jobs and dry runs side by side: whose turn it is, and what memory counts as free meanwhile."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.weights.checkpoint import Checkpoint
from tests.server.fake_engine import STUCK
from tests.server.fake_tuner import BLOCKER, LOG
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import held_up_scans, until_job
from tests.tiny import make_checkpoint, make_variant

BUDGET: dict[str, object] = {"policy": "budget"}


def stage_of(server: LiveServer, job: dict[str, Any]) -> Any:
    return server.client.get(f"/models/jobs/{job['id']}").json()["stage"]


@contextmanager
def asked_aside(server: LiveServer, source: Path) -> Iterator[Callable[[], httpx.Response]]:
    """A dry run that has begun to wait for its turn; what is yielded waits for its answer."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(server.client.post("/models/plan", json={"source": str(source)}))

    thread = threading.Thread(target=ask)
    thread.start()
    server.until(lambda: server.services.onboarder._limit.num_rehearsing == 1)

    def answer() -> httpx.Response:
        thread.join(60)
        return answers[0]

    yield answer
    thread.join(60)


def shape_of(model: Path) -> Path:
    folder = model.parent / "shape"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    return folder


def test_share_of_a_running_tuner_counts_as_free(tmp_path: Path, models: dict[str, Path]) -> None:
    tall = make_checkpoint(tmp_path / "tall", layers=3, seed=4)
    usual = EngineConfig()
    with Checkpoint.open(tall) as checkpoint:
        token_bytes = kv_cache_bytes(checkpoint.config, usual) // usual.kv_cache_tokens
    # A tuner takes 128 MiB and more; the new family takes 150, and two thirds of that are taken.
    engine: dict[str, object] = {
        "memory_budget": 270 << 20,
        "kv_cache_tokens": (150 << 20) // token_bytes // 16 * 16,
    }
    with live_server(
        tmp_path / "s", models={"base": models["base"]}, root=tmp_path,
        settings={"sharing": BUDGET, "engine": engine},
    ) as server:  # fmt: skip
        server.until_ready()
        shape = {"source": str(shape_of(models["near"]))}
        before = server.client.post("/models/plan", json=shape).json()["free_bytes"]
        (models["near"] / BLOCKER).touch()
        job = server.onboard("near", models["near"], wait=False).json()
        server.until(lambda: stage_of(server, job) == "tuning")
        free = 'linker_device_memory_bytes{device="cpu",state="free"}'
        assert server.metric(free) < 100 << 20
        assert server.client.post("/models/plan", json=shape).json()["free_bytes"] == before
        behind = server.onboard("tall", tall, wait=False)
        assert behind.status_code == 202, behind.text
        (models["near"] / BLOCKER).unlink()
        until_job(server, behind.json()["id"], "succeeded")


def test_dry_run_waits_for_a_donor_that_is_being_onboarded(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    with live_server(tmp_path / "s", root=tmp_path, limits=LIMITS) as server:
        server.until(server.services.onboarder._restorer.done.is_set)
        with held_up_scans(server) as scans:
            job = server.onboard("base", models["base"], wait=False).json()
            assert scans.begun.wait(30)
            shape = {"source": str(shape_of(models["near"]))}
            refusal = server.client.post("/models/plan", json=shape)  # waits for no turn
            assert refusal.status_code == 503
            assert refusal.json()["error"]["code"] == "not_ready"
            with asked_aside(server, models["near"]) as answer:
                scans.go_on.set()
                assert answer().json()["donor"] == "base"
        until_job(server, job["id"], "succeeded")


def test_no_tuner_takes_room_while_a_job_loads(tmp_path: Path, models: dict[str, Path]) -> None:
    with live_server(
        tmp_path / "s", models={"base": models["base"]}, root=tmp_path, limits=LIMITS,
        settings={"sharing": BUDGET},
    ) as server:  # fmt: skip
        server.until_ready()
        job = server.onboard(STUCK, models["near"], wait=False, policy="exact").json()
        server.until(lambda: stage_of(server, job) == "loading")
        with asked_aside(server, models["near"]):
            assert server.services.onboarder._jobs._arrivals._planner.turn.locked()
            assert not (models["near"] / LOG).exists()
            server.services.engine.kill()  # the fake engine would load it for ever
            until_job(server, job["id"], "failed")


@pytest.mark.parametrize(
    "options", [{"policy": "exact"}, {"tau_cos": 0.5, "tau_frob": 0.9}, {"budget_kl": 0}]
)
def test_dry_run_that_needs_no_tuner_passes_one_that_runs(
    tmp_path: Path, models: dict[str, Path], options: dict[str, object]
) -> None:
    with live_server(
        tmp_path / "s", models={"base": models["base"]}, root=tmp_path,
        settings={"sharing": BUDGET},
    ) as server:  # fmt: skip
        server.until_ready()
        far = make_variant(tmp_path / "far", models["base"], scale=0.01, seed=4)
        (models["near"] / BLOCKER).touch()
        job = server.onboard("near", models["near"], wait=False).json()
        server.until(lambda: stage_of(server, job) == "tuning")
        answer = server.client.post("/models/plan", json={"source": str(far), **options})
        assert answer.status_code == 200, answer.text
        assert answer.json()["donor"] == "base"
        assert stage_of(server, job) == "tuning"
        (models["near"] / BLOCKER).unlink()
        until_job(server, job["id"], "succeeded")


def test_end_of_a_dry_run_brings_back_what_had_no_room(
    live: LiveServer, models: dict[str, Path]
) -> None:
    async def lose() -> None:
        await live.services.evictions.unload("near")
        live.services.onboarder._restorer._left_out.add("near")  # as when it found no room

    live.call(lose())
    assert live.services.catalog.get("near") is None
    body = {"source": str(models["near"])}
    assert live.client.post("/models/plan", json=body).status_code == 200
    live.until(lambda: live.services.catalog.get("near") is not None)


def test_stored_scan_is_not_timed(tmp_path: Path, models: dict[str, Path]) -> None:
    with live_server(tmp_path / "s", models=models) as server:
        server.until_ready()
        assert server.client.delete("/models/near").status_code == 200
    with live_server(tmp_path / "s", root=tmp_path) as server:
        server.until_ready()
        job = server.onboard("near", models["near"], wait=False, donor="base").json()
        seconds = until_job(server, job["id"], "succeeded")["result"]["seconds"]
    assert seconds["hash"] > 0
    assert seconds["scan"] == 0
