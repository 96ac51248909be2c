from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.onboarding import job_log
from server.onboarding.job_log import say_begun, say_cancelled, say_failed
from server.onboarding.live_job import LiveJob
from tests.server.live import LiveServer
from tests.server.onboarding.family import held_up_scans, until_job


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log's lines about jobs, without what differs from run to run."""
    lines = (r.getMessage() for r in caplog.records if r.name == job_log.__name__)
    return [re.sub(r"\d+\.\d s", "N s", re.sub(r"job-\w+", "JOB", line)) for line in lines]


def test_log_says_when_a_job_begins_each_stage_once_and_how_it_ended(
    live: LiveServer, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger=job_log.__name__):
        job = live.onboard("late", models["near"], wait=False, donor="base", policy="exact").json()
        until_job(live, job["id"], "succeeded")
        live.until(lambda: said(caplog)[-1].startswith("onboarding late: done"))
    lines = said(caplog)
    assert lines[0] == "onboarding late begins (JOB)"
    assert lines[-2:] == ["onboarding late: loading", "onboarding late: done after N s"]
    assert len(set(lines)) == len(lines)


def test_log_says_why_a_job_failed(
    live: LiveServer, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with held_up_scans(live) as scans:
        job = live.onboard("late", models["near"], wait=False).json()
        assert scans.begun.wait(30)
        (models["near"] / "model.safetensors").write_bytes(b"")
    error = until_job(live, job["id"], "failed")["error"]
    assert f"onboarding late failed after N s: {error['message']}" in said(caplog)


def test_job_that_never_began_is_said_to_have_ended_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger=job_log.__name__):
        say_cancelled(LiveJob(id="job-1", model="near"))
    assert said(caplog) == ["onboarding near: cancelled before it began"]


def test_failed_replan_is_said_to_leave_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    live = LiveJob(id="job-1", model="near", replans=True)
    with caplog.at_level("INFO", logger=job_log.__name__):
        say_begun(live)
        say_begun(live)  # its turn has come after a download
        say_failed(live, "There is no room.")
    assert said(caplog) == [
        "re-planning near begins (JOB)",
        "re-planning near failed after N s; it keeps its plan: There is no room.",
    ]
