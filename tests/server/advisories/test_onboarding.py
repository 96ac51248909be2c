"""Rows B6-B13: onboarding under load, full disks, dependants, and hostile identifiers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from linker_core.errors import InsufficientCapacityError
from server.settings import Settings
from tests.server.advisories.attacks import refused
from tests.server.fake_engine import Fault
from tests.server.in_process import Server, real_processes_after
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.hub_site import FILES, site
from tests.tiny import make_checkpoint, make_variant


def forget(server: LiveServer, *names: str) -> None:
    for name in names:
        assert server.client.delete(f"/models/{name}").status_code == 200


def test_triton_32_threads_onboard_one_name(target: LiveServer, root: Path, source: Path) -> None:
    def ask(number: int) -> httpx.Response:
        chosen = source if number % 4 else root / "near"
        return target.client.post("/models", json={"name": "attack", "source": str(chosen)})

    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(ask, range(64)))
    jobs = {answer.json()["id"] for answer in answers if answer.status_code == 202}
    assert len(jobs) == 1
    for answer in answers:
        if answer.status_code != 202:
            refused(answer, 409, "conflict")
            assert answer.headers["x-should-retry"] == "false"
    target.call(target.services.onboarder.wait(jobs.pop()))
    forget(target, "attack")


def test_cve_2026_100650_limit_counts_before_the_work_begins(tmp_path: Path, root: Path) -> None:
    settings = {"models": {"onboarding_queue": 2}}
    with live_server(
        tmp_path, models={"base": root / "base"}, root=root, settings=settings
    ) as server:
        server.until_ready()

        def ask(number: int) -> httpx.Response:
            body = {"name": f"attack-{number}", "source": str(root / "near")}
            return server.client.post("/models", json=body)

        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(ask, range(16)))
        taken = [answer for answer in answers if answer.status_code == 202]
        assert taken
        jobs = server.client.get("/models/jobs").json()["data"]
        assert len([job for job in jobs if job["model"] != "base"]) == len(taken)
        full = [answer for answer in answers if answer.status_code != 202]
        assert full
        for answer in full:
            refused(answer, 429, "queue_full")
        for answer in taken:
            server.call(server.services.onboarder.wait(answer.json()["id"]))


def test_sglang_issue_26638_killed_server_leaves_orphans(tmp_path: Path, root: Path) -> None:
    orphans = [
        tmp_path / "hub" / "unfinished" / "gone" / "model.safetensors.part",
        tmp_path / "hub" / "trees" / "0000" / "model.safetensors",
        tmp_path / "deltas" / "gone.incomplete" / "model.safetensors",
        tmp_path / "deltas" / "nobodys" / "model.safetensors",
    ]
    for orphan in orphans:
        orphan.parent.mkdir(parents=True)
        orphan.write_bytes(bytes(4096))
    with live_server(tmp_path, models={"base": root / "base"}, root=root) as server:
        server.until_ready()
        server.until(lambda: not any(orphan.exists() for orphan in orphans))
        assert server.chat("base").status_code == 200


def test_khoj_issue_369_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with site(tmp_path) as there:
        write, left = os.pwrite, [20_000]

        def full(descriptor: int, data: bytes, position: int) -> int:
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = write(descriptor, data[: left[0]], position)
            left[0] -= count
            return count

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(InsufficientCapacityError):
            there.fetch()
        assert not any(file.endswith(".part") for file in there.files())
        monkeypatch.undo()
        assert {path.name for path in there.fetch().iterdir()} == set(FILES)


def test_vllm_issue_52871_device_runs_out_of_memory_while_a_model_loads(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "root" / "base", tie=False)
    make_variant(tmp_path / "root" / "near", base, scale=0.01)
    settings = Settings.model_validate(
        {
            "storage": {"state": tmp_path / "state"},
            "models": {"root": tmp_path / "root"},
            "engine": {"memory_budget": 1 << 26, "kv_cache_tokens": 512},
            "sharing": {"policy": "exact"},
        }
    )

    async def attack() -> None:
        server = await Server.start(settings)
        body = {"name": "base", "source": str(base), "donor": "auto"}
        assert (await server.post("/models", body, wait=True)).status_code == 201
        question = {"model": "base", "prompt": "Once", "max_tokens": 8, "temperature": 0}

        async def answer() -> Any:
            response = await server.post("/v1/completions", {**question, "logprobs": 2})
            return response.json()["choices"]

        said, held = await answer(), server.engine.storage_bytes()
        near = {"name": "near", "source": str(tmp_path / "root" / "near")}
        for after in range(4):
            server.faults.load_after = after
            failed = await server.post("/models", near, wait=True)
            assert failed.status_code in (503, 507), failed.text
            assert server.engine.storage_bytes() == held
            assert await answer() == said
            deleted = await server.client.delete("/models/near")
            assert deleted.status_code == 200
        assert (await server.post("/models", near, wait=True)).status_code == 201
        assert await answer() == said
        server.check_engines()
        await server.stop()

    with real_processes_after():
        asyncio.run(attack())


def test_triton_unload_dependents_donor_in_use(target: LiveServer) -> None:
    for response in (
        target.client.delete("/models/base"),
        target.client.post("/models/unload", json={"model": "base"}),
        target.client.delete("/v1/models/base"),
    ):
        assert "near" in refused(response, 409, "conflict")
        assert response.headers["x-should-retry"] == "false"


def test_triton_unload_while_a_stream_runs(target: LiveServer, root: Path) -> None:
    assert target.onboard("attack", root / "near").status_code == 201
    body = {"model": "attack", "prompt": [Fault.SLOW, 50, 51], "max_tokens": 20, "stream": True}
    with target.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        forget(target, "attack")
        refused(target.chat("attack"), 404, "model_not_found")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_idempotency_key_draft_07_same_key_other_body(target: LiveServer, root: Path) -> None:
    def ask(**more: Any) -> httpx.Response:
        body = {"name": "attack", "source": str(root / "near"), **more}
        return target.client.post("/models", json=body, headers={"Idempotency-Key": "attack-key"})

    with ThreadPoolExecutor(8) as threads:
        first = list(threads.map(lambda _: ask(), range(8)))
    assert {answer.status_code for answer in first} == {202}
    assert len({answer.json()["id"] for answer in first}) == 1
    refused(ask(pin=True), 409, "conflict")
    target.call(target.services.onboarder.wait(first[0].json()["id"]))
    forget(target, "attack")


QUOTES = [
    "' OR '1'='1", "'; DROP TABLE models;--", '" OR ""="', "%27%20OR%201=1", "\\'; SELECT 1--",
    "1) UNION SELECT name FROM sqlite_master--", "near' AND 1=CAST((SELECT 1) AS INT)--", "${x}",
]  # fmt: skip


@pytest.mark.parametrize("payload", QUOTES, ids=lambda payload: f"CVE-2026-40008 {payload}")
def test_sql_in_every_identifier(target: LiveServer, root: Path, payload: str) -> None:
    registry = target.services.settings.state_directory() / "registry.sqlite3"
    with sqlite3.connect(registry) as database:
        tables = sorted(database.execute("SELECT name FROM sqlite_master").fetchall())
        rows = database.execute("SELECT count(*) FROM models").fetchone()
    for method, path in (
        ("GET", "/models/{}"), ("DELETE", "/models/{}"), ("GET", "/v1/models/{}"),
        ("GET", "/models/jobs/{}"), ("POST", "/models/jobs/{}/cancel"),
    ):  # fmt: skip
        response = target.client.request(method, path.format(quote(payload, safe="")))
        assert response.status_code in (404, 405), (method, path, response.text)
    refused(target.chat(payload), 404, "model_not_found")
    refused(target.onboard(payload, root / "near", wait=False), 400, param="name")
    refused(target.onboard("attack", root / "near", wait=False, donor=payload), 404)
    headers = {"Idempotency-Key": payload, "X-Request-Id": payload}
    body = {"name": "attack", "source": str(root / "near")}
    response = target.client.post("/models", json=body, headers=headers)
    if response.status_code == 202:
        target.call(target.services.onboarder.wait(response.json()["id"]))
        forget(target, "attack")
    else:
        refused(response, 400)
    with sqlite3.connect(registry) as database:
        assert sorted(database.execute("SELECT name FROM sqlite_master").fetchall()) == tables
        assert database.execute("SELECT count(*) FROM models").fetchone() == rows
