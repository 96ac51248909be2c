"""Engine deaths, stalls, disconnects and restarts, over the fake engine."""

from __future__ import annotations

import json
import shlex
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.bridge.supervisor import SupervisionLimits
from server.registry.records import JobRecord, JobStatus, ModelState
from server.registry.store import Registry
from tests.server.fake_engine import FAKE_ENGINE, KILLER, MUTE_ENGINE, UNUSABLE, Fault
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint

LIMITS = SupervisionLimits(poll_s=0.05, stall_s=0.2, stall_kill_s=0.6, backoff_s=0.01)
NEVER_KILL = replace(LIMITS, stall_kill_s=3600.0)


@pytest.fixture
def live(tmp_path: Path, models: dict[str, Path]) -> Iterator[LiveServer]:
    with live_server(tmp_path / "state", models=models, root=tmp_path, limits=LIMITS) as server:
        server.until_ready()
        yield server


def loads(models: dict[str, Path]) -> list[str]:
    return [
        line
        for path in models.values()
        if (path / "loads.log").exists()
        for line in (path / "loads.log").read_text().splitlines()
    ]


def running(server: LiveServer, model: str = "base") -> float:
    return server.metric(f'linker_num_requests_running{{model="{model}"}}')


def stream(server: LiveServer, prompt: list[int]) -> Any:
    body = {"model": "base", "prompt": prompt, "stream": True, "max_tokens": 100}
    return server.client.stream("POST", "/v1/completions", json=body)


def test_engine_death_ends_a_stream_with_an_error_and_done(live: LiveServer) -> None:
    with stream(live, [Fault.DIE, 50, 51]) as response:
        assert response.status_code == 200
        blocks = response.read().decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    error = json.loads(blocks[-3].removeprefix("data: "))["error"]
    assert error["code"] == "engine_failure"


def test_engine_death_ends_a_waiting_request_with_503(live: LiveServer) -> None:
    response = live.complete("base", [Fault.DIE, 50], max_tokens=50)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_failure"
    assert response.headers["Retry-After"]


def test_engine_death_ends_other_requests_too(live: LiveServer) -> None:
    ended: list[httpx.Response] = []
    waiting = threading.Thread(
        target=lambda: ended.append(live.complete("base", [Fault.WAIT, 50], max_tokens=50))
    )
    waiting.start()
    live.until(lambda: running(live) == 1)
    live.complete("base", [Fault.DIE, 50], max_tokens=50)
    waiting.join(30)
    assert ended[0].json()["error"]["code"] == "engine_failure"


def test_engine_restarts_with_every_model(live: LiveServer, models: dict[str, Path]) -> None:
    first = live.services.engine.pid
    live.complete("base", [Fault.DIE, 50], max_tokens=50)
    live.until_ready()
    assert live.services.engine.pid != first
    assert live.chat("base").status_code == live.chat("near").status_code == 200
    assert loads(models) == ["base None donor"] * 2 + ["near base thresholds"] * 2


def test_not_ready_while_the_engine_is_down(tmp_path: Path, models: dict[str, Path]) -> None:
    with live_server(
        tmp_path / "state", models=models, limits=LIMITS, engine_command=MUTE_ENGINE
    ) as server:
        ready = server.client.get("/ready")
        assert ready.status_code == 503
        assert ready.headers["Retry-After"]
        assert server.client.get("/health").status_code == 200
        assert server.chat("base").status_code == 503


def test_stalled_engine_is_not_ready_though_alive(tmp_path: Path, models: dict[str, Path]) -> None:
    with live_server(tmp_path / "state", models=models, limits=NEVER_KILL) as server:
        server.until_ready()
        hanging = threading.Thread(target=server.complete, args=("base", [Fault.HANG]))
        hanging.start()
        server.until(lambda: server.client.get("/ready").status_code == 503)
        assert server.client.get("/ready").json()["reason"] == "the engine is stalled"
        assert server.client.get("/health").status_code == 200
        server.services.engine.kill()
        hanging.join(30)


def test_engine_that_stays_stalled_is_killed_and_replaced(live: LiveServer) -> None:
    response = live.complete("base", [Fault.HANG])
    assert response.json()["error"]["code"] == "engine_failure"
    live.until_ready()
    assert live.chat("base").status_code == 200


def test_engine_that_keeps_dying_makes_the_server_give_up(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_crashes=1)
    with live_server(tmp_path, limits=limits, engine_command=("false",)) as server:
        server.until(server.services.engine.given_up.is_set)
        assert server.client.get("/ready").json()["reason"] == "the engine is given_up"
        dead = server.client.get("/health")
        assert dead.status_code == 503
        assert dead.json() == {"status": "dead", "reason": "the engine is given_up"}


def test_engine_that_cannot_be_started_at_first_is_tried_again(
    tmp_path: Path, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "engine"  # missing: an OSError, as where processes have run out
    limits = replace(LIMITS, max_crashes=1000, backoff_s=1e-9)
    with live_server(
        tmp_path / "state", models=models, limits=limits, engine_command=(str(program),)
    ) as server:
        server.until(lambda: "no engine can be started" in caplog.text)
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        ready = tmp_path / "ready"
        ready.write_text(f'#!/bin/sh\nexec {shlex.join(FAKE_ENGINE)} "$@"\n')
        ready.chmod(0o755)
        ready.rename(program)
        server.until_ready()
        assert server.chat("base").status_code == 200


def test_engine_that_can_never_be_started_makes_the_server_give_up(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_crashes=1)
    nothing = (str(tmp_path / "nothing"),)
    with live_server(tmp_path, limits=limits, engine_command=nothing) as server:
        server.until(server.services.engine.given_up.is_set)
        assert server.client.get("/ready").json()["reason"] == "the engine is given_up"


def test_engine_that_is_silent_for_too_long_makes_the_server_dead(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    limits = replace(NEVER_KILL, dead_s=1.0)
    with live_server(tmp_path / "state", models=models, limits=limits) as server:
        server.until_ready()
        assert server.client.get("/health").status_code == 200
        pid = server.services.engine.pid
        assert pid is not None
        psutil.Process(pid).suspend()
        server.until(lambda: server.client.get("/health").status_code == 503)
        psutil.Process(pid).resume()
        server.until(lambda: server.client.get("/health").status_code == 200)


def test_server_that_stood_still_does_not_blame_the_engine(
    live: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert live.services.engine.pid is not None
    engine = psutil.Process(live.services.engine.pid)

    async def stand_still() -> None:
        engine.suspend()
        time.sleep(5 * LIMITS.stall_kill_s)
        engine.resume()

    live.call(stand_still())
    live.until(lambda: live.client.get("/ready").status_code == 200)
    assert live.services.engine.pid == engine.pid
    assert "stands still" not in caplog.text


def test_server_without_its_registry_is_degraded_and_goes_on_serving(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.registry.health._PERIOD_S", 0.05)
    with live_server(tmp_path / "state", models=models, root=tmp_path) as server:
        server.until_ready()
        assert server.client.get("/ready").json() == {"status": "ready"}
        with closing(sqlite3.connect(tmp_path / "state" / "registry.sqlite3")) as other:
            other.execute("BEGIN EXCLUSIVE")
            server.until(lambda: server.client.get("/ready").json()["status"] == "degraded")
            assert server.client.get("/ready").status_code == 200
            assert server.chat("base").status_code == 200
            refused = server.onboard("third", models["near"], wait=False)
            assert refused.status_code == 503
            assert refused.headers["Retry-After"]
            other.rollback()
        server.until(lambda: server.client.get("/ready").json() == {"status": "ready"})


def test_stream_that_is_left_aborts_its_sequence(live: LiveServer) -> None:
    with stream(live, [Fault.WAIT, 50]) as response:
        # The first token is special and gives no text; the sequence runs all the same.
        del response
    live.until(lambda: running(live) == 0)
    assert live.metric('linker_request_success_total{finished_reason="abort",model="base"}') == 1


def test_waiting_request_that_is_left_aborts_its_sequence(live: LiveServer) -> None:
    body = {"model": "base", "prompt": [Fault.WAIT, 50], "max_tokens": 50}
    with pytest.raises(httpx.ReadTimeout):
        live.client.post("/v1/completions", json=body, timeout=1.0)
    live.until(lambda: running(live) == 0)
    live.until(
        lambda: (
            live.metric('linker_request_success_total{finished_reason="abort",model="base"}') == 1
        )
    )


def test_reader_that_is_far_behind_is_cut_off(live: LiveServer) -> None:
    # Ten thousand tokens arrive in one message, before anyone can have read the first.
    response = live.complete("base", [Fault.FLOOD, 50], max_tokens=150, ignore_eos=True)
    assert response.status_code == 503


def test_full_server_is_429(tmp_path: Path, models: dict[str, Path]) -> None:
    settings = {"http": {"max_inflight": 2}}
    with live_server(tmp_path / "state", models=models, settings=settings) as server:
        server.until_ready()
        with stream(server, [Fault.MUTE, 50]):
            response = server.chat("base", n=2)
            assert response.status_code == 429
            assert response.headers["Retry-After"] == "1"
        server.until(lambda: running(server) == 0)
        assert server.chat("base", n=2).status_code == 200


def test_draining_server_finishes_streams_and_refuses_new_work(live: LiveServer) -> None:
    with stream(live, [Fault.WAIT, 50]) as _response:
        pass
    live.until(lambda: running(live) == 0)
    assert live.call(live.services.gate.drain(5)) is True
    refused = live.chat("base")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "not_ready"
    assert live.client.get("/ready").status_code == 503
    assert live.onboard("x", Path("x"), wait=False).status_code == 503


def test_restart_brings_models_back_with_their_stored_plan(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    state = tmp_path / "state"
    with live_server(state, models={"base": models["base"]}, root=tmp_path) as server:
        server.until_ready()
        card = server.onboard("near", models["near"], policy="exact").json()
    with live_server(state) as server:
        server.until_ready()
        assert server.client.get("/models/near").json()["plan"] == card["plan"]
        assert server.chat("near").status_code == 200
        assert len(server.client.get("/models/jobs").json()["data"]) == 2
    assert loads(models) == ["base None donor"] * 2 + ["near base exact"] * 2


def test_restart_marks_a_changed_model_failed_and_keeps_the_others(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    state = tmp_path / "state"
    with live_server(state, models=models) as server:
        server.until_ready()
    weights = models["near"] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with live_server(state) as server:
        server.until_ready()
        card = server.client.get("/models/near").json()
        assert (card["state"], card["error"]["code"]) == ("failed", "bad_checkpoint")
        assert server.chat("base").status_code == 200


def test_restart_finishes_an_interrupted_job(tmp_path: Path, models: dict[str, Path]) -> None:
    state = tmp_path / "state"
    with live_server(state, root=tmp_path, engine_command=MUTE_ENGINE) as server:
        server.onboard("base", models["base"], wait=False)
    with live_server(state, root=tmp_path) as server:
        server.until_ready()
        assert server.client.get("/models/base").json()["state"] == "ready"
        jobs = server.client.get("/models/jobs").json()["data"]
        assert "running" not in {job["status"] for job in jobs}
        assert "queued" not in {job["status"] for job in jobs}


def test_start_up_model_replaces_the_stored_row_of_its_name(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    state = tmp_path / "state"
    with live_server(state, models=models) as server:
        server.until_ready()
    make_checkpoint(tmp_path / "newer", seed=9)
    with live_server(state, models={"base": tmp_path / "newer"}) as server:
        server.until_ready()
        assert server.services.roster.model("base").source == str(tmp_path / "newer")
        near = server.client.get("/models/near").json()
        assert (near["state"], near["donor"]) == ("ready", "base")
        assert near["blocks"]["alias"] == 0  # planned anew against the new donor


def test_same_start_up_models_keep_their_plans(tmp_path: Path, models: dict[str, Path]) -> None:
    state = tmp_path / "state"
    for _ in range(2):
        with live_server(state, models=models) as server:
            server.until_ready()
            jobs = server.client.get("/models/jobs").json()["data"]
    assert len(jobs) == 2


def test_failed_start_up_model_leaves_the_server_ready(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    broken = {**models, "broken": tmp_path / "nothing"}
    with live_server(tmp_path / "state", models=broken) as server:
        server.until_ready()
        assert server.client.get("/models/broken").json()["state"] == "failed"
        assert server.services.onboarder.startup_failures() == ["broken"]


def test_model_that_kills_the_engine_fails_and_the_others_return(
    live: LiveServer, models: dict[str, Path]
) -> None:
    response = live.onboard(KILLER, models["near"])
    assert response.json()["error"]["code"] == "engine_failure"
    live.until_ready()
    assert live.client.get(f"/models/{KILLER}").json()["state"] == "failed"
    assert live.chat("near").status_code == 200


def test_stored_model_that_kills_every_engine_is_marked_failed(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    state = tmp_path / "state"
    with live_server(state, models=models, root=tmp_path) as server:
        server.until_ready()
        assert server.onboard("third", models["near"]).status_code == 201
    registry = Registry.open(f"sqlite:///{state / 'registry.sqlite3'}")
    record = registry.model("third")
    assert record is not None
    registry.save(replace(record, name=KILLER))
    registry.close()
    with live_server(state, limits=LIMITS) as server:
        server.until_ready()
        assert server.client.get(f"/models/{KILLER}").json()["state"] == "failed"
        assert server.chat("third").status_code == 200


def test_model_without_a_first_token_fails_its_job_and_is_never_served(
    live: LiveServer, models: dict[str, Path]
) -> None:
    said = live.chat("near").json()["choices"]
    refused = live.onboard(UNUSABLE, models["near"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "unusable_model")
    assert live.client.get(f"/models/{UNUSABLE}").json()["state"] == "failed"
    assert live.chat(UNUSABLE).json()["error"]["code"] == "not_ready"
    assert live.chat("near").json()["choices"] == said
    snapshot = live.services.engine.snapshot
    assert snapshot is not None
    assert set(snapshot.models) == {"base", "near"}


@pytest.mark.parametrize("state", [ModelState.READY, ModelState.UNLOADED])
def test_stored_model_without_a_first_token_fails_when_it_comes_back_and_no_other_does(
    tmp_path: Path, models: dict[str, Path], state: ModelState
) -> None:
    folder = tmp_path / "state"
    with live_server(folder, models=models, root=tmp_path) as server:
        server.until_ready()
        assert server.onboard("third", models["near"]).status_code == 201
    registry = Registry.open(f"sqlite:///{folder / 'registry.sqlite3'}")
    record = registry.model("third")
    assert record is not None
    registry.save(replace(record, name=UNUSABLE, state=state))
    registry.close()
    with live_server(folder) as server:
        server.until_ready()
        asked = server.chat(UNUSABLE)  # brings it back, where it was not to be there at the start
        assert (asked.status_code, asked.json()["error"]["code"]) == (503, "not_ready")
        card = server.client.get(f"/models/{UNUSABLE}").json()
        assert (card["state"], card["error"]["code"]) == ("failed", "unusable_model")
        tried = loads(models)
        assert server.chat(UNUSABLE).status_code == 503
        assert loads(models) == tried  # not again and again
        for name in ("base", "near", "third"):
            assert server.chat(name).status_code == 200


def test_interrupted_job_of_a_deleted_source_is_marked_failed(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    state = tmp_path / "state"
    with live_server(state, models=models) as server:
        server.until_ready()
        record = server.services.roster.model("near")
    registry = Registry.open(f"sqlite:///{state / 'registry.sqlite3'}")
    lost = replace(record, state=ModelState.ONBOARDING, source="/gone")
    lost = replace(lost, request={**record.request, "source": "/gone"})
    job = JobRecord(
        id="job-lost", model="near", request=lost.request, status=JobStatus.RUNNING, created_at=1.0
    )
    registry.save(lost, job)
    registry.close()
    with live_server(state) as server:
        server.until_ready()
        assert server.client.get("/models/near").json()["state"] == "failed"
        assert server.client.get("/models/jobs/job-lost").json()["status"] == "failed"
