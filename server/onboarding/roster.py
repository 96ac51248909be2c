"""The known models and jobs: the registry's rows, mirrored in memory so that reading needs no SQL.

Event loop only; rows are written through threads, and the mirror follows once they are stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace

from linker_core.errors import ModelNotFoundError, NotReadyError
from linker_core.sharing.plan import SharePlan
from server.metrics.serving import ServingMetrics
from server.onboarding.outcomes import without_plan
from server.onboarding.rates import Rates
from server.onboarding.request import OnboardRequest
from server.onboarding.stored import restored
from server.registry.records import JobRecord, JobStatus, Json, ModelRecord, ModelState
from server.registry.store import Registry

logger = logging.getLogger(__name__)

_MAX_LISTED_JOBS = 100


class Roster:
    """Models by name and jobs by id.

    Args:
        registry: Where they rest.
        metrics: Told which models exist.
    """

    def __init__(self, *, registry: Registry, metrics: ServingMetrics) -> None:
        self._registry = registry
        self._metrics = metrics
        self._models: dict[str, ModelRecord] = {}
        self._jobs: dict[str, JobRecord] = {}  # that wait or run, or whose end is not stored yet
        self._rates = Rates()
        self._unwritten: dict[tuple[type, str], ModelRecord | JobRecord] = {}
        self._writing = asyncio.Lock()  # keeps the rows in the order of the calls

    async def open(self) -> list[JobRecord]:
        """Reads the registry; returns the jobs that the last stop interrupted."""
        for record in await asyncio.to_thread(self._registry.models):
            self.show(record)
        for record in self.models():
            if record.plan is not None and restored(SharePlan.from_json, record.plan) is None:
                logger.error("the stored plan of model %s is damaged", record.name)
                await self.save(without_plan(record))
        return await asyncio.to_thread(self._registry.unfinished_jobs)

    def models(self) -> list[ModelRecord]:
        """Returns every known model in order of arrival."""
        return sorted(self._models.values(), key=lambda model: model.position)

    def find(self, name: str) -> ModelRecord | None:
        """Returns one model, or None."""
        return self._models.get(name)

    def model(self, name: str) -> ModelRecord:
        """Returns one model.

        Raises:
            ModelNotFoundError: There is none of that name.
        """
        record = self._models.get(name)
        if record is None:
            raise ModelNotFoundError(f"The model {name[:200]!r} does not exist.", param="model")
        return record

    def plans(self) -> list[Json]:
        """Returns the plans that rows speak of."""
        return [model.plan for model in self.models() if model.plan is not None]

    def dependants(self, name: str) -> list[str]:
        """Returns the models whose donor this is."""
        return [model.name for model in self.models() if model.donor == name]

    def live_job(self, job_id: str) -> JobRecord:
        """Returns a job that waits or runs."""
        return self._jobs[job_id]

    async def job(self, job_id: str) -> JobRecord | None:
        """Returns any job, or None."""
        return self._jobs.get(job_id) or await asyncio.to_thread(self._registry.job, job_id)

    async def jobs(self) -> list[JobRecord]:
        """Returns the hundred newest jobs, the newest first."""
        stored = await asyncio.to_thread(self._registry.jobs, limit=_MAX_LISTED_JOBS)
        return [self._jobs.get(job.id, job) for job in stored]

    async def newest_job(self, model: str) -> JobRecord:
        """Returns the last job that made a model what it is or is to be."""
        stored = await asyncio.to_thread(self._registry.jobs, model=model, limit=_MAX_LISTED_JOBS)
        jobs = [self._jobs.get(job.id, job) for job in stored]
        request = self.model(model).request
        return next((job for job in jobs if job.request == request), jobs[0])

    async def save(self, *records: ModelRecord | JobRecord) -> None:
        """Stores records in one transaction, then shows them.

        Raises:
            NotReadyError: The registry cannot be written; nothing has changed.
        """
        async with self._writing:
            await asyncio.to_thread(self._registry.save, *records)
        for record in records:
            self._unwritten.pop(_key(record), None)
        self.show(*records)
        self._drop_finished(records)

    async def settle(self, *records: ModelRecord | JobRecord) -> None:
        """Shows how something ended; stores it now, or later if the registry cannot be written."""
        try:
            await self.save(*records)
        except NotReadyError as error:
            logger.warning("the end of a job or a model is not stored yet: %s", error.message)
            self.show(*records)
            self._unwritten.update({_key(record): record for record in records})

    async def write_later(self) -> None:
        """Stores what `settle` could not.

        Raises:
            NotReadyError: The registry still cannot be written.
        """
        async with self._writing:
            records = list(self._unwritten.values())
            if not records:
                return
            await asyncio.to_thread(self._registry.save, *records)
            self._unwritten = {
                key: record for key, record in self._unwritten.items() if record not in records
            }
        self._drop_finished(records)

    def show(self, *records: ModelRecord | JobRecord) -> None:
        """Shows records without storing them."""
        for record in records:
            if isinstance(record, ModelRecord):
                self._models[record.name] = record
                self._metrics.add_model(record.name)
            else:
                self._jobs[record.id] = record

    def note_progress(self, job: JobRecord) -> None:
        """Shows a job's progress without storing it."""
        self._jobs[job.id] = job
        self._rates.note(job)

    def bytes_per_second(self, job: JobRecord) -> float | None:
        """Returns how fast a job comes on in its stage; None if nobody knows."""
        return self._rates.bytes_per_second(job)

    async def note_use(self, used_at: dict[str, float]) -> None:
        """Stores when models were last used."""
        known = {name: at for name, at in used_at.items() if name in self._models}
        for name, at in known.items():
            self._models[name] = replace(self._models[name], last_used_at=at)
        if known:
            await asyncio.to_thread(self._registry.touch, known)

    async def forget(self, name: str) -> None:
        """Deletes a model's row and series.

        Raises:
            ConflictError: It is the donor of others.
            NotReadyError: The registry cannot be written.
        """
        async with self._writing:
            await asyncio.to_thread(self._registry.delete_model, name)
        del self._models[name]
        self._unwritten.pop((ModelRecord, name), None)
        self._metrics.remove_model(name)

    async def queue(self, request: OnboardRequest, *, job: JobRecord | None = None) -> JobRecord:
        """Stores a model that is to be onboarded with its job: a new one, or one to do again."""
        now, stored = time.time(), self._models.get(request.name)
        job = job or _new_job(request)
        job = replace(job, request=request.to_json(), status=JobStatus.QUEUED)
        record = ModelRecord(
            name=request.name,
            source=request.source,
            request=request.to_json(),
            state=ModelState.ONBOARDING,
            position=self._next_position() if stored is None else stored.position,
            created_at=now,
            donor=self._named_donor(request),
        )
        await self.save(record, job)
        return job

    async def queue_replan(self, request: OnboardRequest) -> JobRecord:
        """Stores the job of a ready model that is to get another plan; the model stays as it is."""
        job = _new_job(request)
        await self.save(job)
        return job

    def _named_donor(self, request: OnboardRequest) -> str | None:
        """Returns the donor a request names, which cannot be deleted from here on."""
        known = request.donor in self._models and request.donor != request.name
        return request.donor if known else None

    def _drop_finished(self, records: Iterable[ModelRecord | JobRecord]) -> None:
        """Forgets jobs that have ended; their rows are asked for from now on."""
        for record in records:
            if isinstance(record, JobRecord) and record.finished_at is not None:
                self._jobs.pop(record.id, None)
                self._rates.forget(record.id)

    def _next_position(self) -> int:
        return max((model.position + 1 for model in self._models.values()), default=0)


def _new_job(request: OnboardRequest) -> JobRecord:
    return JobRecord(
        id=f"job-{uuid.uuid4().hex}",
        model=request.name,
        request=request.to_json(),
        status=JobStatus.QUEUED,
        created_at=time.time(),
    )


def _key(record: ModelRecord | JobRecord) -> tuple[type, str]:
    return type(record), record.name if isinstance(record, ModelRecord) else record.id
