from __future__ import annotations

from dataclasses import replace

import pytest

from server.onboarding.rates import Rates
from server.registry.records import JobRecord, JobStage, JobStatus

JOB = JobRecord(
    id="j", model="m", request={}, status=JobStatus.RUNNING, created_at=0.0,
    stage=JobStage.SCANNING, done_bytes=0, total_bytes=1000,
)  # fmt: skip


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rates(clock: Clock) -> Rates:
    return Rates(clock=clock)


def moved(done_bytes: int, stage: JobStage = JobStage.SCANNING) -> JobRecord:
    return replace(JOB, stage=stage, done_bytes=done_bytes)


def test_rate_is_what_has_moved_since_the_stage_was_first_heard_of(
    rates: Rates, clock: Clock
) -> None:
    rates.note(moved(100))
    assert rates.bytes_per_second(moved(100)) is None
    assert rates.remaining_s(moved(100)) is None
    clock.now += 4
    rates.note(moved(300))
    assert rates.bytes_per_second(moved(300)) == 50
    assert rates.remaining_s(moved(300)) == 14
    clock.now += 4  # a stage that stands still slows down
    assert rates.bytes_per_second(moved(300)) == 25


@pytest.mark.parametrize("after", [moved(500, JobStage.LOADING), moved(50)])
def test_stage_that_begins_has_a_rate_of_its_own(
    rates: Rates, clock: Clock, after: JobRecord
) -> None:
    rates.note(moved(100))
    clock.now += 4
    rates.note(after)
    assert rates.bytes_per_second(after) is None
    clock.now += 2
    assert rates.bytes_per_second(replace(after, done_bytes=after.done_bytes + 20)) == 10


def test_job_that_does_not_run_has_no_rate(rates: Rates, clock: Clock) -> None:
    rates.note(moved(0))
    clock.now += 4
    done = moved(100)
    assert rates.bytes_per_second(replace(done, status=JobStatus.SUCCEEDED)) is None
    rates.forget("j")
    assert rates.bytes_per_second(done) is None
