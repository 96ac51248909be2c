"""The status that /models/events tells."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.bridge.supervisor import EngineState
from server.gateway.status import SILENT_S, Status, StatusNews, status_card
from tests.server.live import LiveServer, live_server


@pytest.fixture
def live(family: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path, models={"base": family / "base"}, root=family) as server:
        server.until_ready()
        yield server


def records(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def card(live: LiveServer) -> dict[str, Any]:
    async def look() -> dict[str, Any]:
        return status_card(live.services)

    return live.call(look())


def test_status_follows_the_snapshot_and_what_is_generated(live: LiveServer) -> None:
    with live.client.stream("GET", "/models/events") as response:
        events = records(response.iter_lines())
        assert next(events)["type"] == "snapshot"
        first = next(events)
        assert (first["type"], first["engine"], first["ready"]) == ("status", "running", True)
        assert first["reason"] is None
        assert first["models"] == {"base": {"running": 0, "waiting": 0, "generation_tokens": 0}}
        assert {"prompt_tokens": 0, "generation_tokens": 0, "requests": 0}.items() <= first[
            "totals"
        ].items()
        assert (first["running"], first["waiting"]) == (0, 0)
        snapshot = live.services.engine.snapshot
        assert snapshot is not None
        assert first["kv_usage_ratio"] == snapshot.kv_usage_ratio > 0
        usage = live.complete("base", "abcd", max_tokens=3, ignore_eos=True).json()["usage"]
        for status in events:
            if status["type"] == "status" and status["totals"]["requests"]:
                break
        totals = status["totals"]
        assert totals["generation_tokens"] == usage["completion_tokens"] == 3
        assert totals["prompt_tokens"] == usage["prompt_tokens"]
        assert {"preemptions", "prefix_queries", "prefix_hits"} <= totals.keys()
        assert status["models"]["base"]["generation_tokens"] == 3
        assert status["time"] > first["time"]


def test_totals_outlive_the_model_that_they_are_of(live: LiveServer, family: Path) -> None:
    live.onboard("near", family / "near").raise_for_status()
    live.complete("near", "abcd", max_tokens=3, ignore_eos=True).raise_for_status()
    live.until(lambda: bool(card(live)["totals"]["requests"]))
    assert live.client.delete("/models/near").status_code == 200
    status = card(live)
    assert status["totals"]["generation_tokens"] == 3
    assert set(status["models"]) == {"base"}


def test_device_adds_up_to_its_budget(live: LiveServer) -> None:
    live.until(lambda: card(live)["device"] is not None and card(live)["device"]["weights"] > 0)
    device = card(live)["device"]
    assert device["name"] == "cpu"
    assert device["budget"] == sum(device[part] for part in ("weights", "kv", "free", "other"))
    assert device["weights"] == live.client.get("/models/base").json()["bytes"]["unique"]


def test_status_says_why_a_server_is_not_ready(live: LiveServer) -> None:
    live.services.engine.state = EngineState.STALLED
    status = card(live)
    live.services.engine.state = EngineState.RUNNING
    assert (status["engine"], status["ready"]) == ("stalled", False)
    assert status["reason"] == "the engine is stalled"
    live.services.registry._is_failing = True
    status = card(live)
    live.services.registry._is_failing = False
    assert status["ready"] is True
    assert status["reason"] == "the registry cannot be written"


def test_status_is_told_at_most_once_a_second_once_more_and_then_seldom(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, status = 100.0, {"n": 0}
    monkeypatch.setattr("server.gateway.status.status_card", lambda _: dict(status))
    news = StatusNews(Status(live.services, clock=lambda: now))
    assert news.take() == {"type": "status", "n": 0, "time": 100.0}
    now = 101.0
    assert news.take() is None  # nothing has happened
    status["n"] = 1
    now = 101.5
    assert news.take() is None  # too soon
    now = 102.0
    assert news.take() == {"type": "status", "n": 1, "time": 102.0}
    now = 103.0
    assert news.take() == {"type": "status", "n": 1, "time": 103.0}  # it stands still
    now = 104.0
    assert news.take() is None
    now = 103.0 + SILENT_S
    assert news.take() == {"type": "status", "n": 1, "time": now}  # still here
    now += 1.0
    assert news.take() is None


def test_followers_share_one_look_a_second_and_are_each_told_what_is_news_to_them(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, num_tokens, looks = 100.0, 0, []

    def look(_: Any) -> dict[str, Any]:
        looks.append(now)
        return {"n": num_tokens}

    monkeypatch.setattr("server.gateway.status.status_card", look)
    shared = Status(live.services, clock=lambda: now)
    early = [StatusNews(shared) for _ in range(64)]
    assert [news.take() for news in early] == [{"type": "status", "n": 0, "time": 100.0}] * 64
    looks.clear()
    num_tokens, now = 1, 101.0
    assert [news.take() for news in early] == [{"type": "status", "n": 1, "time": 101.0}] * 64
    assert looks == [101.0]
    num_tokens, now = 2, 101.5
    late = StatusNews(shared)
    assert late.take() == {"type": "status", "n": 2, "time": 101.5}  # as it is now
    now = 102.0
    assert [news.take() for news in early] == [{"type": "status", "n": 2, "time": 101.5}] * 64
    assert looks == [101.0, 101.5]
    num_tokens, now = 3, 102.5
    assert late.take() == {"type": "status", "n": 3, "time": 102.5}
    assert looks == [101.0, 101.5, 102.5]


def test_idle_server_tells_that_it_is_still_there_and_nothing_else(live: LiveServer) -> None:
    """Takes the news as followers do, as often as a status may come."""
    live.until(lambda: not live.services.onboarder._jobs._live)

    async def looks() -> list[float]:
        now = 0.0
        news = StatusNews(Status(live.services, clock=lambda: now))
        first = news.take()
        assert first is not None
        del first["time"]
        seen = []
        for _ in range(50):
            now += 1.0
            if (again := news.take()) is not None:
                seen.append(again.pop("time"))
                assert again == first
            await asyncio.sleep(0)
        return seen

    assert live.call(looks()) == [SILENT_S, 2 * SILENT_S, 3 * SILENT_S]
