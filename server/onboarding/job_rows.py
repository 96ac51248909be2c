"""The rows of jobs, from the first to the last word about one. Event loop only."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from server.onboarding.job_log import say_begun, say_stage
from server.onboarding.live_job import LiveJob
from server.onboarding.outcomes import cancelled_job, unwanted_job
from server.onboarding.planner import OnStage
from server.onboarding.replays import Once
from server.onboarding.request import AUTO_DONOR, OnboardRequest
from server.onboarding.roster import Roster
from server.onboarding.row_writes import options_of
from server.registry.records import JobRecord, JobStage, JobStatus, ModelRecord, ModelState


class JobRows:
    """Writes the rows of jobs, and of the models that come and go with them.

    Args:
        roster: The known models and jobs.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    async def queue(
        self,
        request: OnboardRequest,
        *,
        job: JobRecord | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        once: Once | None = None,
    ) -> JobRecord:
        """Stores a model that is to be onboarded with its job: a new one, or one to do again.

        Args:
            request: What is asked for.
            job: One that was interrupted; None: a new one.
            options: See `Options.set`; what is left out stays as it was of a known model.
            once: The idempotency key that the job answers from now on.
        """
        now, stored = time.time(), self._roster.find(request.name)
        job = job or _new_job(request)
        kept = {} if stored is None else options_of(stored)
        job = replace(job, request=request.to_json(), status=JobStatus.QUEUED)
        record = ModelRecord(
            name=request.name,
            source=request.source,
            request=request.to_json(),
            state=ModelState.ONBOARDING,
            position=self._next_position() if stored is None else stored.position,
            created_at=now,
            donor=self._named_donor(request, stored),
            **{**kept, **options},
        )
        await self._roster.save(record, job, *([] if once is None else [once.used_for(job.id)]))
        return job

    async def queue_replan(self, request: OnboardRequest, *, once: Once | None = None) -> JobRecord:
        """Stores the job of a ready model that is to get another plan; the model stays as it is."""
        job = _new_job(request)
        await self._roster.save(job, *([] if once is None else [once.used_for(job.id)]))
        return job

    async def begin(self, live: LiveJob) -> JobRecord:
        """Stores that a job runs."""
        say_begun(live)
        job = replace(self._roster.live_job(live.id), status=JobStatus.RUNNING)
        await self._roster.save(job)
        return job

    def on_stage(self, live: LiveJob) -> OnStage:
        """Returns a callback that shows how far a job is."""

        def on_stage(stage: JobStage, done_bytes: int, total_bytes: int) -> None:
            say_stage(live, stage)
            job = self._roster.live_job(live.id)
            self._roster.shown.note_progress(
                replace(job, stage=stage, done_bytes=done_bytes, total_bytes=total_bytes)
            )

        return on_stage

    async def mark_unwanted(self, job_id: str) -> bool:
        """Stores that a job is being cancelled, so that no start takes it up again.

        Returns:
            Whether it had not ended before.

        Raises:
            NotReadyError: The registry cannot be written; nothing has changed.
        """

        def current() -> JobRecord | None:
            return self._roster.live_job(job_id) if self._roster.is_open(job_id) else None

        return await self._roster.writes.change(current, unwanted_job)

    async def withdraw(self, job: JobRecord) -> None:
        """Ends a job that was cancelled; a model that was never ready goes with it.

        Models that wait for it to be their donor wait for it no more.
        """
        model = self._roster.find(job.model)
        if model is None or model.state is not ModelState.ONBOARDING:
            await self._roster.settle(cancelled_job(job))
            return
        names = self._roster.dependants(job.model)
        waiting = [replace(self._roster.model(name), donor=None) for name in names]
        await self._roster.settle(cancelled_job(job), *waiting, delete=(job.model,))

    async def without_cancelled(self, unfinished: Sequence[JobRecord]) -> list[JobRecord]:
        """Returns what the last stop interrupted, after ending what was being cancelled then."""
        interrupted: list[JobRecord] = []
        for job in unfinished:
            if job.error is None:
                interrupted.append(job)
            else:
                await self.withdraw(job)
        return interrupted

    def _named_donor(self, request: OnboardRequest, stored: ModelRecord | None) -> str | None:
        """Returns the donor a request names, which cannot be deleted from here on.

        If it has been deleted, it is the one that took its place in the model's family.
        """
        if request.donor in (None, AUTO_DONOR, request.name):
            return None
        if self._roster.find(request.donor) is not None:
            return request.donor
        return None if stored is None else stored.donor

    def _next_position(self) -> int:
        return max((model.position + 1 for model in self._roster.models()), default=0)


def _new_job(request: OnboardRequest) -> JobRecord:
    return JobRecord(
        id=f"job-{uuid.uuid4().hex}",
        model=request.name,
        request=request.to_json(),
        status=JobStatus.QUEUED,
        created_at=time.time(),
    )
