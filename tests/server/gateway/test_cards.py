from __future__ import annotations

import pytest

from server.gateway.cards import job_card
from server.registry.records import JobRecord, JobStage, JobStatus


@pytest.mark.parametrize(
    ("rate", "remaining_seconds"), [(50.0, 14.0), (None, None)], ids=["known", "unknown"]
)
def test_progress_tells_rate_and_remaining_time_where_they_are_known(
    rate: float | None, remaining_seconds: float | None
) -> None:
    job = JobRecord(
        id="j", model="m", request={}, status=JobStatus.RUNNING, created_at=0.0,
        stage=JobStage.SCANNING, done_bytes=300, total_bytes=1000,
    )  # fmt: skip
    assert job_card(job, bytes_per_second=rate)["progress"] == {
        "done_bytes": 300,
        "total_bytes": 1000,
        "bytes_per_second": rate,
        "remaining_seconds": remaining_seconds,
    }


def test_total_that_was_guessed_too_small_leaves_no_time_below_zero() -> None:
    job = JobRecord(
        id="j", model="m", request={}, status=JobStatus.RUNNING, created_at=0.0,
        stage=JobStage.TUNING, done_bytes=1100, total_bytes=1000,
    )  # fmt: skip
    assert job_card(job, bytes_per_second=1.0)["progress"]["remaining_seconds"] == 0
