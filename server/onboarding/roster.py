"""The known models and jobs: the registry's rows, mirrored in memory so that reading needs no SQL.

Event loop only; rows are written through threads, and the mirror follows once they are stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from linker_core.errors import ModelNotFoundError, NotReadyError
from linker_core.sharing.plan import SharePlan
from server.metrics.serving import ServingMetrics
from server.onboarding.feed import Feed
from server.onboarding.outcomes import cancelled_job, unwanted_job, without_plan
from server.onboarding.rates import Rates
from server.onboarding.replays import Once
from server.onboarding.request import AUTO_DONOR, OnboardRequest
from server.onboarding.stored import restored
from server.onboarding.unbroken import unbroken
from server.registry.records import JobRecord, JobStatus, Json, ModelRecord, ModelState, Record
from server.registry.store import Registry

logger = logging.getLogger(__name__)

_MAX_LISTED_JOBS = 100
_OPTIONS = ("alias", "pinned", "keep_alive_s")  # the operator's alone to change


class Roster:
    """Models by name and jobs by id.

    Args:
        registry: Where they rest.
        metrics: Told which models exist.

    Attributes:
        feed: Hears of every change.
        names: Guards checks of names and donors together with the changes that follow from them.
    """

    def __init__(self, *, registry: Registry, metrics: ServingMetrics) -> None:
        self.feed = Feed()
        self.names = asyncio.Lock()
        self._registry = registry
        self._metrics = metrics
        self._models: dict[str, ModelRecord] = {}
        self._jobs: dict[str, JobRecord] = {}  # that wait or run, or whose end is not stored yet
        self._rates = Rates()
        # What `settle` could not store; None: a model that was to be deleted.
        self._unwritten: dict[tuple[type, str], ModelRecord | JobRecord | None] = {}
        self._writing = asyncio.Lock()  # keeps the rows in the order of the calls

    async def open(self) -> list[JobRecord]:
        """Reads the registry; returns the jobs that the last stop interrupted."""
        for record in await asyncio.to_thread(self._registry.models):
            self.show(record)
        for record in self.models():
            if record.plan is not None and restored(SharePlan.from_json, record.plan) is None:
                logger.error("the stored plan of model %s is damaged", record.name)
                await self.save(without_plan(record))
        return await self._interrupted()

    async def _interrupted(self) -> list[JobRecord]:
        """Returns what the last stop interrupted, after ending what was being cancelled then."""
        interrupted: list[JobRecord] = []
        for job in await asyncio.to_thread(self._registry.unfinished_jobs):
            if job.error is None:
                interrupted.append(job)
            else:
                await self.withdraw(job)
        return interrupted

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

    def named(self, name: str) -> ModelRecord:
        """Returns the model of a name or an alias.

        Raises:
            ModelNotFoundError: There is none.
        """
        if name not in self._models:
            aliased = [model for model in self._models.values() if model.alias == name]
            if aliased:
                return aliased[0]
        return self.model(name)

    def plans(self) -> list[Json]:
        """Returns the plans that rows speak of."""
        return [model.plan for model in self.models() if model.plan is not None]

    def dependants(self, name: str) -> list[str]:
        """Returns the models whose donor this is."""
        return [model.name for model in self.models() if model.donor == name]

    def live_job(self, job_id: str) -> JobRecord:
        """Returns a job that waits or runs."""
        return self._jobs[job_id]

    def live_jobs(self) -> list[JobRecord]:
        """Returns the jobs that wait or run, in order of arrival."""
        return sorted(
            (job for job in self._jobs.values() if job.finished_at is None),
            key=lambda job: job.created_at,
        )

    def is_open(self, job_id: str) -> bool:
        """Whether a job waits or runs."""
        job = self._jobs.get(job_id)
        return job is not None and job.finished_at is None

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

    async def save(self, *records: Record) -> None:
        """Stores records in one transaction, then shows them; see `replace`."""
        await self.replace(save=records)

    async def replace(self, *, delete: Sequence[str] = (), save: Sequence[Record] = ()) -> None:
        """Stores records and deletes models in one transaction, then shows that.

        A cancelled wait ends when that is done.

        Raises:
            ConflictError: One of the models to be deleted would still be the donor of another.
            NotReadyError: The registry cannot be written; nothing has changed.
        """
        await unbroken(self._replace(delete, save))

    async def settle(self, *records: ModelRecord | JobRecord, delete: Sequence[str] = ()) -> None:
        """Shows how something ended; stores it now, or later if the registry cannot be written."""
        await unbroken(self._settle(records, delete))

    async def write_later(self) -> None:
        """Stores what `settle` could not.

        Raises:
            NotReadyError: The registry still cannot be written.
        """
        async with self._writing:
            waiting = dict(self._unwritten)
            if not waiting:
                return
            records = [self._merged(record) for record in waiting.values() if record is not None]
            deleted = [name for (_, name), record in waiting.items() if record is None]
            await asyncio.to_thread(self._registry.replace, delete=deleted, save=records)
            self._unwritten = {
                key: record
                for key, record in self._unwritten.items()
                if key not in waiting or record is not waiting[key]
            }
        self._drop_finished(records)

    async def _replace(self, delete: Sequence[str], save: Sequence[Record]) -> None:
        async with self._writing:
            save = [self._merged(record) for record in save]
            await asyncio.to_thread(self._registry.replace, delete=delete, save=save)
            records = [record for record in save if isinstance(record, ModelRecord | JobRecord)]
            keys = [_key(record) for record in records] + [(ModelRecord, name) for name in delete]
            for key in keys:
                self._unwritten.pop(key, None)
            self.show(*records)
            self._drop(delete)
            self._drop_finished(records)

    def _merged(self, record: Record) -> Record:
        """Returns a record with what others may have changed since it was made."""
        if isinstance(record, JobRecord) and record.finished_at is None:
            job = self._jobs.get(record.id)
            return record if job is None else replace(record, error=job.error)
        if isinstance(record, ModelRecord):
            model = self._models.get(record.name)
            if model is not None and model.created_at == record.created_at:
                used_at = model.last_used_at  # stored by `note_use`
                return replace(record, **_options_of(model), last_used_at=used_at)
        return record

    async def _settle(
        self, records: Sequence[ModelRecord | JobRecord], delete: Sequence[str]
    ) -> None:
        try:
            await self._replace(delete, records)
        except NotReadyError as error:
            logger.warning("the end of a job or a model is not stored yet: %s", error.message)
            self.show(*records)
            self._drop(delete)
            self._unwritten |= {_key(record): record for record in records}
            self._unwritten |= {(ModelRecord, name): None for name in delete}

    def amend(self, name: str, **changes: Any) -> None:
        """Changes fields of a model's row at once; it is stored by the next `write_later`."""
        record = replace(self.model(name), **changes)
        self.show(record)
        self._unwritten[_key(record)] = record

    def show(self, *records: ModelRecord | JobRecord) -> None:
        """Shows records without storing them."""
        for record in records:
            if isinstance(record, ModelRecord):
                self._models[record.name] = record
                self._metrics.add_model(record.name)
                self.feed.note_model(record.name)
            else:
                self._jobs[record.id] = record
                self.feed.note_job(record)

    def note_progress(self, job: JobRecord) -> None:
        """Shows a job's progress without storing it."""
        self._jobs[job.id] = job
        self._rates.note(job)
        self.feed.note_job(job)

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
        await self.replace(delete=(name,))

    async def set_options(self, name: str, options: Mapping[str, Any]) -> None:
        """Stores what the operator wants of a model's residency.

        Nothing else changes these fields of a known model, whatever records are saved.

        Args:
            name: The model.
            options: `alias`, `pinned`, `keep_alive_s`, or some of them.

        Raises:
            ModelNotFoundError: There is none of that name.
            NotReadyError: The registry cannot be written; nothing has changed.
        """
        assert options.keys() <= set(_OPTIONS)
        await unbroken(self._set_options(name, options))

    async def _set_options(self, name: str, options: Mapping[str, Any]) -> None:
        async with self._writing:
            record = replace(self.model(name), **options)
            await asyncio.to_thread(self._registry.save, record)
            self.show(replace(self.model(name), **options))  # the rest may have changed

    async def mark_unwanted(self, job_id: str) -> bool:
        """Stores that a job is being cancelled, so that no start takes it up again.

        Returns:
            Whether it had not ended before.

        Raises:
            NotReadyError: The registry cannot be written; nothing has changed.
        """
        return await unbroken(self._mark_unwanted(job_id))

    async def _mark_unwanted(self, job_id: str) -> bool:
        async with self._writing:
            if not self.is_open(job_id):
                return False
            job = unwanted_job(self._jobs[job_id])
            await asyncio.to_thread(self._registry.save, job)
            self.show(replace(self._jobs[job_id], error=job.error))  # it may have come on
            return True

    async def withdraw(self, job: JobRecord) -> None:
        """Ends a job that was cancelled; a model that was never ready goes with it.

        Models that wait for it to be their donor wait for it no more.
        """
        model = self._models.get(job.model)
        if model is None or model.state is not ModelState.ONBOARDING:
            await self.settle(cancelled_job(job))
            return
        waiting = [replace(self._models[name], donor=None) for name in self.dependants(job.model)]
        await self.settle(cancelled_job(job), *waiting, delete=(job.model,))

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
            options: See `set_options`; what is left out stays as it was of a known model.
            once: The idempotency key that the job answers from now on.
        """
        now, stored = time.time(), self._models.get(request.name)
        job = job or _new_job(request)
        kept = {} if stored is None else _options_of(stored)
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
        await self.save(record, job, *([] if once is None else [once.used_for(job.id)]))
        return job

    async def queue_replan(self, request: OnboardRequest, *, once: Once | None = None) -> JobRecord:
        """Stores the job of a ready model that is to get another plan; the model stays as it is."""
        job = _new_job(request)
        await self.save(job, *([] if once is None else [once.used_for(job.id)]))
        return job

    def _named_donor(self, request: OnboardRequest, stored: ModelRecord | None) -> str | None:
        """Returns the donor a request names, which cannot be deleted from here on.

        If it has been deleted, it is the one that took its place in the model's family.
        """
        if request.donor in (None, AUTO_DONOR, request.name):
            return None
        if request.donor in self._models or stored is None:
            return request.donor if request.donor in self._models else None
        return stored.donor

    def _drop(self, names: Iterable[str]) -> None:
        """Shows that models are no more."""
        for name in names:
            del self._models[name]
            self._metrics.remove_model(name)
            self.feed.note_model(name)

    def _drop_finished(self, records: Iterable[Record]) -> None:
        """Forgets jobs that have ended; their rows are asked for from now on."""
        for record in records:
            if isinstance(record, JobRecord) and record.finished_at is not None:
                self._jobs.pop(record.id, None)
                self._rates.forget(record.id)

    def _next_position(self) -> int:
        return max((model.position + 1 for model in self._models.values()), default=0)


def _options_of(record: ModelRecord) -> dict[str, Any]:
    return {option: getattr(record, option) for option in _OPTIONS}


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
