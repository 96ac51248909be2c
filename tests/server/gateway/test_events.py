"""GET /models/events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import InvalidKeyError, QueueFullError
from server.onboarding.feed import MAX_LISTENERS, MAX_UNREAD, Feed
from server.registry.records import JobRecord, JobStatus
from tests.server.live import LiveServer, live_server


@pytest.fixture
def live(family: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path, models={"base": family / "base"}, root=family) as server:
        server.until_ready()
        server.until(lambda: not server.services.onboarder._jobs._live)  # nothing happens any more
        yield server


@contextmanager
def following(server: LiveServer) -> Iterator[Iterator[dict[str, Any]]]:
    """Yields the events of a server as they come, up to the end."""
    with server.client.stream("GET", "/models/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        yield _records(response.iter_lines())


def _records(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))


def until(events: Iterator[dict[str, Any]], kind: str, **fields: Any) -> list[dict[str, Any]]:
    """Returns the events up to one of a kind with these fields."""
    seen = []
    for found in events:
        seen.append(found)
        what = found.get("model") or found.get("job") or found
        if found["type"] == kind and all(what[key] == value for key, value in fields.items()):
            return seen
    raise AssertionError(f"the stream ended before {kind} {fields}: {seen}")


def test_stream_begins_with_what_there_is(live: LiveServer) -> None:
    with following(live) as events:
        first = next(events)
    assert first["type"] == "snapshot"
    assert first["models"] == live.client.get("/models").json()["data"]
    assert first["jobs"] == []


def test_job_and_model_are_followed_from_the_queue_to_their_end(
    live: LiveServer, family: Path
) -> None:
    with following(live) as events:
        next(events)
        job = live.onboard("near", family / "near", wait=False).json()
        seen = until(events, "job", id=job["id"], status="succeeded")
        states = [e["model"]["state"] for e in seen if e["type"] == "model"]
        seen += until(events, "model", id="near", state="ready") if "ready" not in states else []
        live.client.post("/models/unload", json={"model": "near"})
        until(events, "model", id="near", state="unloaded")
        assert live.client.delete("/models/near").status_code == 200
        until(events, "model.deleted", id="near")
    jobs = [e["job"] for e in seen if e["type"] == "job"]
    assert {j["id"] for j in jobs} == {job["id"]}
    assert jobs[-1]["result"]["id"] == "near"


def test_cancelled_job_is_told(live: LiveServer, family: Path) -> None:
    with following(live) as events:
        next(events)
        job = live.onboard("stuck", family / "near", wait=False).json()
        until(events, "job", id=job["id"], stage="loading")
        live.client.post(f"/models/jobs/{job['id']}/cancel")
        until(events, "job", id=job["id"], status="cancelled")


def test_stream_ends_when_the_server_drains(live: LiveServer) -> None:
    with live.client.stream("GET", "/models/events") as response:
        lines = response.iter_lines()
        next(lines)
        live.loop.call_soon_threadsafe(live.services.gate.close)
        *statuses, last = [line for line in lines if line]
        assert last == "data: [DONE]"
        assert {json.loads(line.removeprefix("data: "))["type"] for line in statuses} == {"status"}
    refused = live.client.get("/models/events")
    assert refused.status_code == 503


def test_nothing_is_told_of_the_server_after_a_key_was_revoked(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise InvalidKeyError("The API key of this request is no longer good.")

    monkeypatch.setattr(live.services.keys, "check", refuse)
    with following(live) as events:
        kinds = [found.get("type", "error") for found in events]
    assert kinds == ["snapshot", "error"]  # and no status between the two


def test_listeners_are_bounded_and_gone_when_they_leave(live: LiveServer) -> None:
    feed = live.services.roster.feed
    with following(live) as events:
        next(events)
        assert len(feed._listeners) == 1
    live.until(lambda: not feed._listeners)
    listening = [feed.listen() for _ in range(MAX_LISTENERS)]
    for listener in listening:
        listener.__enter__()
    refused = live.client.get("/models/events")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    for listener in listening:
        listener.__exit__(None, None, None)


def job(number: int, done_bytes: int = 0) -> JobRecord:
    return JobRecord(
        id=f"j{number}", model="m", request={}, status=JobStatus.RUNNING, created_at=0.0,
        done_bytes=done_bytes,
    )  # fmt: skip


def test_what_happens_between_two_looks_comes_as_one() -> None:
    async def scenario() -> None:
        feed = Feed()
        with feed.listen() as listener:
            for done_bytes in range(1000):
                feed.note_job(job(1, done_bytes))
                feed.note_model("m")
            changes = await listener.take()
            assert changes.models == ["m"]
            assert [found.done_bytes for found in changes.jobs] == [999]
            feed.note_model("n")
            assert await listener.take() == (["n"], [])

    asyncio.run(scenario())


def test_listener_that_is_too_far_behind_is_told_and_holds_nothing() -> None:
    async def scenario() -> None:
        feed = Feed()
        with feed.listen() as listener:
            for number in range(MAX_UNREAD + 100):
                feed.note_job(job(number))
            assert not listener._jobs
            with pytest.raises(QueueFullError, match="fast enough"):
                await listener.take()

    asyncio.run(scenario())
