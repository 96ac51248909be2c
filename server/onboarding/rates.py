"""How fast running jobs come on in their stage. Kept in memory; a restart begins anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from server.registry.records import JobRecord, JobStage, JobStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """Where a stage was when it was first heard of."""

    stage: JobStage
    done_bytes: int
    at: float


class Rates:
    """The rate of every job that runs.

    Args:
        clock: Tells seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._starts: dict[str, _Start] = {}

    def note(self, job: JobRecord) -> None:
        """Takes a job's progress; a new stage, or one that began anew, has a rate of its own."""
        start = self._starts.get(job.id)
        if start is None or start.stage is not job.stage or job.done_bytes < start.done_bytes:
            self._starts[job.id] = _Start(
                stage=job.stage, done_bytes=job.done_bytes, at=self._clock()
            )

    def bytes_per_second(self, job: JobRecord) -> float | None:
        """Returns a running job's rate since its stage began; None while nothing has moved."""
        start = self._starts.get(job.id)
        if job.status is not JobStatus.RUNNING or start is None or start.stage is not job.stage:
            return None
        moved, seconds = job.done_bytes - start.done_bytes, self._clock() - start.at
        return moved / seconds if moved > 0 and seconds > 0 else None

    def remaining_s(self, job: JobRecord) -> float | None:
        """Returns what the stage of a running job still takes at its rate; None without one."""
        rate = self.bytes_per_second(job)
        return None if rate is None else remaining_s(job, bytes_per_second=rate)

    def forget(self, job_id: str) -> None:
        """Drops a job that has ended."""
        self._starts.pop(job_id, None)


def remaining_s(job: JobRecord, *, bytes_per_second: float) -> float:
    """Returns what a job's stage still takes at this rate, in seconds."""
    return max(job.total_bytes - job.done_bytes, 0) / bytes_per_second
