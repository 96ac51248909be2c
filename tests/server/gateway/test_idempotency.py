"""Requests that are sent twice under one key."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from linker_core.errors import NotReadyError
from server.onboarding.replays import KEPT_S, Once, Replays
from server.registry.records import ReplayRecord
from server.registry.store import Registry
from tests.server.live import LiveServer, live_server


@pytest.fixture(scope="module")
def live(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    state = tmp_path_factory.mktemp("repeated")
    with live_server(state, models={"base": family / "base"}, root=family) as server:
        server.until_ready()
        yield server


def onboard(server: LiveServer, key: str, name: str, source: Path, **more: Any) -> httpx.Response:
    body = {"name": name, "source": str(source), **more}
    return server.client.post("/models", json=body, headers={"Idempotency-Key": key})


def test_same_key_and_body_is_the_same_job_even_when_the_model_has_gone(
    live: LiveServer, family: Path
) -> None:
    first = onboard(live, "once", "near", family / "near").json()
    live.call(live.services.onboarder.wait(first["id"]))
    again = onboard(live, "once", "near", family / "near")
    assert (again.status_code, again.json()["id"]) == (202, first["id"])
    assert live.client.delete("/models/near").status_code == 200
    again = onboard(live, "once", "near", family / "near")
    assert again.json()["id"] == first["id"]
    assert live.client.get("/models/near").status_code == 404


def test_same_key_with_another_body_is_409(live: LiveServer, family: Path) -> None:
    first = onboard(live, "twice", "far", family / "far").json()
    other = onboard(live, "twice", "far", family / "far", pin=True)
    assert other.status_code == 409
    assert other.headers["x-should-retry"] == "false"
    assert other.json()["error"]["param"] == "Idempotency-Key"
    assert live.client.get("/models/far").json()["pinned"] is False
    live.call(live.services.onboarder.wait(first["id"]))
    live.client.delete("/models/far")


def test_refused_request_may_be_sent_again_under_its_key(live: LiveServer, family: Path) -> None:
    refused = onboard(live, "mended", "odd", family / "nothing")
    assert refused.status_code == 400
    job = onboard(live, "mended", "odd", family / "near")
    assert job.status_code == 202
    live.call(live.services.onboarder.wait(job.json()["id"]))
    live.client.delete("/models/odd")


def test_key_of_a_replan_is_honoured(live: LiveServer, family: Path) -> None:
    live.onboard("near", family / "near")
    headers = {"Idempotency-Key": "replan"}
    body = {"policy": "exact"}
    first = live.client.patch("/models/near", json=body, headers=headers).json()
    live.call(live.services.onboarder.wait(first["id"]))
    live.client.patch("/models/near", json={"tau_cos": 0.5, "tau_frob": 0.9}, params={"wait": True})
    again = live.client.patch("/models/near", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    assert live.client.get("/models/near").json()["plan"]["policy"] == "thresholds"
    live.client.delete("/models/near")


def test_requests_of_one_key_at_once_make_one_job(live: LiveServer, family: Path) -> None:
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(onboard(live, "at-once", "near", family / "near"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    live.call(live.services.onboarder.wait(answers[0].json()["id"]))
    live.client.delete("/models/near")


@pytest.mark.parametrize("key", [b"", b"a b", "é".encode(), b"k" * 256])
def test_bad_key_is_400(live: LiveServer, family: Path, key: bytes) -> None:
    body = {"name": "near", "source": str(family / "near")}
    response = live.client.post("/models", json=body, headers={b"Idempotency-Key": key})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Idempotency-Key"
    assert live.client.get("/models/near").status_code == 404


def test_key_is_forgotten_after_a_day(tmp_path: Path) -> None:
    registry = Registry.open(f"sqlite:///{tmp_path / 'registry.sqlite3'}")
    registry.save(ReplayRecord(key="k", digest="d", job="job-1", created_at=1000.0))

    async def job_of(once: Once, now: float) -> str | None:
        async with Replays(registry, clock=lambda: now).turn(once) as job:
            return job

    assert asyncio.run(job_of(Once("k", "d"), 1000.0 + KEPT_S - 1)) == "job-1"
    assert asyncio.run(job_of(Once("k", "other"), 1000.0 + KEPT_S + 1)) is None
    assert registry.replay("k") is None
    registry.close()


def test_locked_registry_keeps_one_thread_however_many_keys_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.sqlite3"
    registry, num_asked = Registry.open(f"sqlite:///{file}"), 0
    forget = registry.forget_replays

    def counted(oldest: float) -> None:
        nonlocal num_asked
        num_asked += 1
        forget(oldest)

    async def ask(number: int) -> str | None:
        async with replays.turn(Once(key=f"key-{number}", digest="d")) as job:
            return job

    async def ask_all() -> list[str | BaseException | None]:
        return await asyncio.gather(*map(ask, range(20)), return_exceptions=True)

    monkeypatch.setattr(registry, "forget_replays", counted)
    replays = Replays(registry)
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        refused = asyncio.run(ask_all())
        other.rollback()
    assert {type(error) for error in refused} == {NotReadyError}
    assert num_asked == 1
    registry.probe()
    assert asyncio.run(ask(0)) is None
    registry.close()
