"""Cancelled jobs: at every stage, and what is left of them, which is nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from linker_core.errors import JobCancelledError
from server.registry.records import JobRecord, JobStatus, ModelRecord, ModelState
from tests.server import fake_tuner, held_encoder
from tests.server.fake_engine import STUCK
from tests.server.held_encoder import HELD_ENCODER
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import (
    delta_folders,
    held_up_scans,
    locked_registry,
    open_registry,
    residual,
    until_job,
)
from tests.tiny import make_variant

RUNGS = {"0.001": "int4:64", "0.02": "signs:64"}


@pytest.fixture
def live(tmp_path: Path, models: dict[str, Path]) -> Iterator[LiveServer]:
    """A server of `base`; a variant is tuned, and encoded in four bits."""
    residual(models["near"], RUNGS)
    with live_server(
        tmp_path / "state", models={"base": models["base"]}, root=tmp_path, limits=LIMITS,
        settings={"sharing": {"policy": "budget"}}, encode_command=HELD_ENCODER,
    ) as server:  # fmt: skip
        server.until_ready()
        yield server


def cancel(server: LiveServer, job: dict[str, Any]) -> httpx.Response:
    return server.client.post(f"/models/jobs/{job['id']}/cancel")


def workers() -> list[str]:
    """Returns the modules of the processes that jobs have started and that run still."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(child.cmdline())
            found += [name for name in ("fake_tuner", "held_encoder", "cached_scan")
                      if name in command]  # fmt: skip
    return found


def stage(server: LiveServer, job: dict[str, Any]) -> tuple[str, str]:
    found = server.client.get(f"/models/jobs/{job['id']}").json()
    return found["status"], found["stage"]


def assert_nothing_is_left(server: LiveServer, name: str, state: Path) -> None:
    """Neither a row nor a folder, a process, a reservation or a byte of the engine's."""
    assert server.client.get(f"/models/{name}").status_code == 404
    assert server.services.registry.model(name) is None
    assert f'model="{name}"' not in server.client.get("/metrics").text
    assert workers() == []
    assert delta_folders(state) == []

    def at_rest() -> bool:
        snapshot = server.services.engine.snapshot
        return (
            snapshot is not None and not snapshot.reserved_bytes and [*snapshot.models] == ["base"]
        )

    server.until(at_rest)  # its reports take their time
    assert server.services.onboarder._jobs._live == {}


def test_job_that_waits_is_cancelled_and_never_begins(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    with held_up_scans(live) as scans:
        first = live.onboard("first", models["near"], wait=False).json()
        assert scans.begun.wait(30)
        second = live.onboard("second", models["near"], wait=False).json()
        response = cancel(live, second)
        assert response.status_code == 200
        assert (response.json()["status"], response.json()["error"]["code"]) == (
            "cancelled", "job_cancelled",
        )  # fmt: skip
        assert cancel(live, first).json()["status"] == "cancelled"
        again = cancel(live, second).json()["error"]["message"]
        assert again == "The job has ended already: it was cancelled."
    assert_nothing_is_left(live, "second", tmp_path / "state")
    assert_nothing_is_left(live, "first", tmp_path / "state")
    assert live.onboard("second", models["near"]).status_code == 201
    assert live.metric('linker_admissions_total{outcome="cancelled"}') == 2


def test_cancelled_tuning_ends_the_tuner_and_gives_its_memory_back(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    (models["near"] / fake_tuner.BLOCKER).touch()
    job = live.onboard("near", models["near"], wait=False).json()
    live.until(lambda: workers() == ["fake_tuner"])
    snapshot = live.services.engine.snapshot
    assert snapshot is not None
    assert snapshot.reserved_bytes > 0
    assert cancel(live, job).json()["status"] == "cancelled"
    assert_nothing_is_left(live, "near", tmp_path / "state")
    (models["near"] / fake_tuner.BLOCKER).unlink()
    assert live.onboard("near", models["near"]).status_code == 201


def test_cancelled_encoding_leaves_no_folder(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    (models["base"] / held_encoder.BLOCKER).touch()
    job = live.onboard("near", models["near"], wait=False).json()
    live.until(lambda: held_encoder.tasks(models["base"]) == ["encode"])
    assert stage(live, job) == ("running", "loading")
    assert cancel(live, job).json()["status"] == "cancelled"
    assert_nothing_is_left(live, "near", tmp_path / "state")


def test_cancelled_loading_is_withdrawn_from_the_engine_with_the_folder(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    job = live.onboard(STUCK, models["near"], wait=False).json()
    live.until(lambda: bool(delta_folders(tmp_path / "state")) and workers() == [])
    live.until(lambda: STUCK in live.services.engine.client._loads)
    assert cancel(live, job).json()["status"] == "cancelled"
    assert_nothing_is_left(live, STUCK, tmp_path / "state")
    assert live.onboard("near", models["near"]).status_code == 201


def test_cancelled_replan_keeps_the_plan(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    before = live.onboard("near", models["near"]).json()
    [folder] = delta_folders(tmp_path / "state")
    (models["base"] / held_encoder.BLOCKER).touch()
    job = live.client.patch("/models/near", json={"budget_kl": 0.03}).json()
    live.until(lambda: workers() == ["held_encoder"])
    assert cancel(live, job).json()["status"] == "cancelled"
    (models["base"] / held_encoder.BLOCKER).unlink()
    assert workers() == []
    assert delta_folders(tmp_path / "state") == [folder]
    after = live.client.get("/models/near").json()
    assert (after["plan"], after["state"]) == (before["plan"], "ready")
    assert live.chat("near").status_code == 200
    again = live.client.patch("/models/near", json={"budget_kl": 0.03}).json()
    assert again["id"] != job["id"]
    until_job(live, again["id"], "succeeded")


def test_replan_that_waits_is_cancelled(
    live: LiveServer, models: dict[str, Path], tmp_path: Path
) -> None:
    before = live.onboard("near", models["near"]).json()
    other = make_variant(tmp_path / "other", tmp_path / "base", scale=0.01, seed=7)
    with held_up_scans(live) as scans:
        live.onboard("other", other, wait=False)
        assert scans.begun.wait(30)
        job = live.client.patch("/models/near", json={"budget_kl": 0.03}).json()
        assert cancel(live, job).json()["status"] == "cancelled"
        assert live.client.delete("/models/near").status_code == 200
    assert before["state"] == "ready"


def test_client_that_waits_for_a_cancelled_job_is_told(
    live: LiveServer, models: dict[str, Path]
) -> None:
    answers: list[httpx.Response] = []
    with held_up_scans(live) as scans:
        waiting = threading.Thread(
            target=lambda: answers.append(live.onboard("near", models["near"]))
        )
        waiting.start()
        assert scans.begun.wait(30)
        [job] = [j for j in live.client.get("/models/jobs").json()["data"]
                 if j["model"] == "near"]  # fmt: skip
        assert cancel(live, job).status_code == 200
        waiting.join(30)
    assert answers[0].status_code == 409
    assert answers[0].json()["error"]["code"] == "job_cancelled"


def test_job_that_has_ended_or_never_was_cannot_be_cancelled(
    live: LiveServer, models: dict[str, Path]
) -> None:
    job = live.onboard("near", models["near"], wait=False).json()
    until_job(live, job["id"], "succeeded")
    refused = cancel(live, job)
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")
    message = refused.json()["error"]["message"]
    assert message == "The job has ended already: it has succeeded."
    assert cancel(live, {"id": "job-nothing"}).status_code == 404
    assert live.chat("near").status_code == 200


def test_cancellation_that_cannot_be_stored_changes_nothing(
    live: LiveServer, models: dict[str, Path]
) -> None:
    with held_up_scans(live) as scans:
        job = live.onboard("near", models["near"], wait=False).json()
        assert scans.begun.wait(30)
        with locked_registry(live):
            assert cancel(live, job).json()["error"]["code"] == "not_ready"
    until_job(live, job["id"], "succeeded")


def test_variant_that_waits_for_a_cancelled_donor_fails_and_says_so(
    live: LiveServer, tmp_path: Path, models: dict[str, Path]
) -> None:
    far = make_variant(tmp_path / "far", models["base"], scale=0.01, seed=5)
    with held_up_scans(live) as scans:
        donor = live.onboard("other", models["base"], donor="other", wait=False)
        donor = live.onboard("second", models["base"], wait=False)
        assert scans.begun.wait(30)
        variant = live.onboard("variant", far, donor="second", wait=False).json()
        row = live.services.registry.model("variant")
        assert row is not None
        assert row.donor == "second"
        assert cancel(live, donor.json()).status_code == 200
    ended = until_job(live, variant["id"], "failed")
    assert "second" in ended["error"]["message"]


def test_cancellation_that_a_kill_interrupted_is_done_by_the_next_start(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    state = tmp_path / "state"
    with live_server(state, models={"base": models["base"]}, root=tmp_path) as server:
        server.until_ready()
        row = server.services.registry.model("base")
    assert row is not None
    registry = open_registry(state)
    error = JobCancelledError("The job was cancelled.").to_record()
    halted: list[ModelRecord | JobRecord] = [
        replace(row, name="near", source=str(models["near"]), state=ModelState.ONBOARDING,
                position=row.position + 1, donor="base", plan=None),
        JobRecord(id="job-1", model="near", request=row.request, status=JobStatus.RUNNING,
                  created_at=time.time(), error=error),
    ]  # fmt: skip
    registry.save(*halted)
    registry.close()
    with live_server(state, models={"base": models["base"]}, root=tmp_path) as server:
        server.until_ready()
        assert server.client.get("/models/near").status_code == 404
        assert server.client.get("/models/jobs/job-1").json()["status"] == "cancelled"
