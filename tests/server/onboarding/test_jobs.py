"""Jobs while other things happen: an engine's death, a swapped source, a locked registry."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_engine import MUTE_ENGINE
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.fake_hub import FakeHub, held_after
from tests.server.onboarding.family import held_up_scans, locked_registry, until_job
from tests.tiny import make_checkpoint, make_variant


def test_engine_death_during_a_scan_is_waited_out(
    live: LiveServer, models: dict[str, Path]
) -> None:
    first = live.services.engine.pid
    with held_up_scans(live) as scans:
        job = live.onboard("late", models["near"], wait=False, donor="base", tau_cos=0.5,
                           tau_frob=0.9).json()  # fmt: skip
        assert scans.begun.wait(30)
        live.services.engine.kill()
        live.until(lambda: live.services.engine.pid != first)
    until_job(live, job["id"], "succeeded")
    assert live.chat("late").status_code == 200


def test_donor_that_is_coming_back_is_waited_for(tmp_path: Path, models: dict[str, Path]) -> None:
    state = tmp_path / "state"
    with live_server(state, models={"base": models["base"]}, root=tmp_path) as server:
        server.until_ready()
    with live_server(state, root=tmp_path, engine_command=MUTE_ENGINE) as server:
        assert server.onboard("near", models["near"], donor="base", wait=False).status_code == 202
        refused = server.client.delete("/models/base")
        assert refused.status_code == 409
    with live_server(state, root=tmp_path) as server:
        server.until(lambda: server.client.get("/models/near").json()["state"] == "ready")
        assert server.client.get("/models/near").json()["donor"] == "base"


@pytest.mark.parametrize(
    ("swap", "code"), [("link", "forbidden_source"), ("files", "bad_checkpoint")]
)
def test_source_that_was_swapped_after_the_check_is_refused(
    live: LiveServer,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    swap: str,
    code: str,
) -> None:
    elsewhere = make_checkpoint(tmp_path_factory.mktemp("outside") / "model", seed=5)
    first = make_variant(tmp_path / "first", tmp_path / "base", scale=0.01, seed=3)
    second = make_variant(tmp_path / "second", tmp_path / "base", scale=0.01, seed=4)
    with held_up_scans(live) as scans:
        live.onboard("first", first, wait=False)
        assert scans.begun.wait(30)
        job = live.onboard("second", second, wait=False).json()
        shutil.rmtree(second)
        if swap == "link":
            second.symlink_to(elsewhere)
        else:
            shutil.copytree(elsewhere, second)
    assert until_job(live, job["id"], "failed")["error"]["code"] == code


def test_failed_job_lets_its_donor_go(live: LiveServer, tmp_path: Path) -> None:
    path = make_variant(tmp_path / "bad", tmp_path / "base", scale=0.01, seed=3)
    with held_up_scans(live) as scans:
        job = live.onboard("bad", path, wait=False).json()
        assert scans.begun.wait(30)
        (path / "model.safetensors").write_bytes(b"")
    until_job(live, job["id"], "failed")
    assert live.client.delete("/models/near").status_code == 200
    assert live.client.delete("/models/base").status_code == 200


def test_job_whose_rows_cannot_be_written_fails_and_the_server_goes_on(
    live: LiveServer, models: dict[str, Path]
) -> None:
    with held_up_scans(live) as scans:
        job = live.onboard("late", models["near"], wait=False).json()
        assert scans.begun.wait(30)
        with locked_registry(live):
            scans.go_on.set()
            ended = until_job(live, job["id"], "failed")
            assert ended["error"]["code"] == "not_ready"
            assert live.chat("near").status_code == 200
            assert live.onboard("x", models["near"], wait=False).status_code == 503
            live.call(live.services.onboarder.flush_once())  # nor does this end the server
            stored = live.services.registry.job(job["id"])
            assert stored is not None
            assert stored.status == "running"
    live.call(live.services.onboarder.flush_once())
    stored = live.services.registry.job(job["id"])
    assert stored is not None
    assert stored.status == "failed"
    near = live.services.registry.model("near")
    assert near is not None
    assert near.last_used_at is not None  # kept until it could be written
    assert live.onboard("late", models["near"]).status_code == 201


def test_finished_jobs_leave_the_memory(live: LiveServer) -> None:
    jobs = live.client.get("/models/jobs").json()["data"]
    assert [job["status"] for job in jobs] == ["succeeded"] * 2
    assert live.services.roster.shown.jobs == {}


def test_sweep_that_fails_ends_neither_a_job_nor_the_server(
    live: LiveServer, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps: list[str] = []

    async def failing(*_: Any, **__: Any) -> None:
        sweeps.append("failed")
        raise OSError("the disk is gone")

    monkeypatch.setattr(live.services.onboarder._admission.deltas, "sweep", failing)
    assert live.onboard("late", models["near"]).status_code == 201
    before = len(sweeps)
    live.loop.call_soon_threadsafe(live.services.onboarder._jobs.catch_up_soon)  # as a dry run does
    live.until(lambda: len(sweeps) > before)
    assert live.client.delete("/models/late").status_code == 200
    assert live.onboard("late", models["near"]).status_code == 201


def fail_to_withdraw(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(live.services.onboarder._jobs._rows, "withdraw", failing)


def test_fault_while_a_waiting_job_is_cancelled_is_told_and_nobody_waits_for_ever(
    live: LiveServer,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail_to_withdraw(live, monkeypatch)
    with held_up_scans(live) as scans:
        first = live.onboard("first", models["near"], wait=False).json()
        assert scans.begun.wait(30)
        second = live.onboard("second", models["near"], wait=False).json()
        assert live.client.post(f"/models/jobs/{second['id']}/cancel").status_code == 503
    until_job(live, first["id"], "succeeded")
    assert "a fault of ours" in caplog.text


def test_fault_while_a_download_is_cancelled_is_told_and_nobody_waits_for_ever(
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reached = threading.Event()
    with FakeHub().running() as hub:
        hub.add("acme/base", models["base"])
        hub.faults["model.safetensors"] = [held_after(5_000, reached)]
        settings: dict[str, dict[str, object]] = {
            "hub": {"endpoint": hub.endpoint, "keep_free_bytes": 0}
        }
        with live_server(tmp_path / "state", root=tmp_path, settings=settings) as server:
            job = server.onboard("base", Path("hub:acme/base@main"), wait=False).json()
            assert reached.wait(60)
            fail_to_withdraw(server, monkeypatch)
            assert server.client.post(f"/models/jobs/{job['id']}/cancel").status_code == 503
            assert server.onboard("other", models["near"]).status_code == 201
            hub.released.set()
    assert "a fault of ours" in caplog.text


def test_variant_of_a_donor_that_is_being_downloaded_waits_for_it(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    reached = threading.Event()
    with FakeHub().running() as hub:
        hub.add("acme/base", models["base"])
        hub.faults["model.safetensors"] = [held_after(5_000, reached)]
        settings: dict[str, dict[str, object]] = {
            "hub": {"endpoint": hub.endpoint, "keep_free_bytes": 0}
        }
        with live_server(tmp_path / "state", root=tmp_path, settings=settings) as server:
            server.onboard("base", Path("hub:acme/base@main"), wait=False)
            assert reached.wait(60)
            job = server.onboard("near", models["near"], donor="base", wait=False).json()
            alone = server.onboard("alone", models["near"], donor="alone")
            assert alone.json()["error"]["code"] == "model_not_found"  # ran meanwhile
            assert server.client.get(f"/models/jobs/{job['id']}").json()["status"] == "queued"
            hub.released.set()
            until_job(server, job["id"], "succeeded")
            assert server.client.get("/models/near").json()["donor"] == "base"
