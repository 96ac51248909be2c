"""The known models and jobs: the registry's rows, mirrored in memory so that reading needs no SQL.

Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from linker_core.errors import JobNotFoundError, ModelNotFoundError
from linker_core.sharing.plan import SharePlan
from server.metrics.serving import ServingMetrics
from server.onboarding.near_names import meant
from server.onboarding.outcomes import without_plan
from server.onboarding.row_writes import RowWrites
from server.onboarding.shown import Shown
from server.onboarding.stored import restored
from server.registry.records import (
    SERVABLE,
    JobRecord,
    JobStatus,
    Json,
    ModelRecord,
    Record,
)
from server.registry.store import Registry
from server.residency.rows import Outlook

logger = logging.getLogger(__name__)

_MAX_LISTED_JOBS = 100
_MAX_COMPARED = 64  # names that an unknown one is compared with


class Roster:
    """Models by name and jobs by id.

    Args:
        registry: Where they rest.
        metrics: Told which models exist.

    Attributes:
        shown: The rows in memory.
        writes: Changes rows.
        feed: Hears of every change.
        names: Guards checks of names and donors together with the changes that follow from them.
    """

    def __init__(self, *, registry: Registry, metrics: ServingMetrics) -> None:
        self.shown = Shown(metrics=metrics)
        self.writes = RowWrites(registry, self.shown)
        self.feed = self.shown.feed
        self.names = asyncio.Lock()
        self._registry = registry

    async def open(self) -> list[JobRecord]:
        """Reads the registry; returns the jobs that the last stop interrupted or was cancelling."""
        for record in await asyncio.to_thread(self._registry.models):
            self.shown.show(record)
        for record in self.models():
            if record.plan is not None and restored(SharePlan.from_json, record.plan) is None:
                logger.error("the stored plan of model %s is damaged", record.name)
                await self.save(without_plan(record))
        return await asyncio.to_thread(self._registry.unfinished_jobs)

    def models(self) -> list[ModelRecord]:
        """Returns every known model in order of arrival."""
        return sorted(self.shown.models.values(), key=lambda model: model.position)

    def find(self, name: str) -> ModelRecord | None:
        """Returns one model, or None."""
        return self.shown.models.get(name)

    def model(self, name: str) -> ModelRecord:
        """Returns one model.

        Raises:
            ModelNotFoundError: There is none of that name.
        """
        record = self.shown.models.get(name)
        if record is None:
            raise ModelNotFoundError(self._unknown(name), param="model")
        return record

    def _unknown(self, name: str) -> str:
        """Returns what is said of a name that is no model's.

        Only models that everybody may list are named.
        """
        holder = next((model.name for model in self.models() if model.alias == name), None)
        if holder is not None:
            return f"{name!r} is an alias of the model {holder!r}; name the model itself."
        listed = (model for model in self.models() if model.state in SERVABLE)
        names = [model.name for model in islice(listed, _MAX_COMPARED)]
        said = f"The model {name[:200]!r} does not exist."
        return f"{said}{meant(name, names)} GET /v1/models lists those that do."

    def named(self, name: str) -> ModelRecord:
        """Returns the model of a name or an alias.

        Raises:
            ModelNotFoundError: There is none.
        """
        if name not in self.shown.models:
            aliased = [model for model in self.shown.models.values() if model.alias == name]
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
        return self.shown.jobs[job_id]

    def live_jobs(self) -> list[JobRecord]:
        """Returns the jobs that wait or run, in order of arrival."""
        return sorted(
            (job for job in self.shown.jobs.values() if job.finished_at is None),
            key=lambda job: job.created_at,
        )

    def is_open(self, job_id: str) -> bool:
        """Whether a job waits or runs."""
        job = self.shown.jobs.get(job_id)
        return job is not None and job.finished_at is None

    async def job(self, job_id: str) -> JobRecord | None:
        """Returns any job, or None."""
        return self.shown.jobs.get(job_id) or await asyncio.to_thread(self._registry.job, job_id)

    async def known_job(self, job_id: str) -> JobRecord:
        """Returns any job.

        Raises:
            JobNotFoundError: There is none of that id.
        """
        job = await self.job(job_id)
        if job is None:
            raise JobNotFoundError(
                "There is no such job. GET /models/jobs lists the newest.", param="id"
            )
        return job

    async def jobs(self) -> list[JobRecord]:
        """Returns the hundred newest jobs, the newest first."""
        stored = await asyncio.to_thread(self._registry.jobs, limit=_MAX_LISTED_JOBS)
        return [self.shown.jobs.get(job.id, job) for job in stored]

    async def newest_job(self, model: str) -> JobRecord:
        """Returns the last job that made a model what it is or is to be."""
        stored = await asyncio.to_thread(self._registry.jobs, model=model, limit=_MAX_LISTED_JOBS)
        jobs = [self.shown.jobs.get(job.id, job) for job in stored]
        request = self.model(model).request
        return next((job for job in jobs if job.request == request), jobs[0])

    def bytes_per_second(self, job: JobRecord) -> float | None:
        """Returns how fast a job comes on in its stage; None if nobody knows."""
        return self.shown.bytes_per_second(job)

    def outlook(self, name: str) -> Outlook | None:
        """Returns what becomes of a model whose job waits or runs; None of others."""
        job = next((job for job in self.live_jobs() if job.model == name), None)
        if job is None:
            return None
        return Outlook(
            job_id=job.id,
            stage=job.stage if job.status is JobStatus.RUNNING else None,
            remaining_s=self.shown.remaining_s(job),
        )

    async def save(self, *records: Record) -> None:
        """Stores records in one transaction, then shows them; see `RowWrites.replace`."""
        await self.writes.replace(save=records)

    async def replace(self, *, delete: Sequence[str] = (), save: Sequence[Record] = ()) -> None:
        """Stores records and deletes models in one transaction; see `RowWrites.replace`."""
        await self.writes.replace(delete=delete, save=save)

    async def settle(self, *records: ModelRecord | JobRecord, delete: Sequence[str] = ()) -> None:
        """Shows how something ended, and stores it sooner or later; see `RowWrites.settle`."""
        await self.writes.settle(*records, delete=delete)

    def amend(self, name: str, **changes: Any) -> None:
        """Changes fields of a model's row at once; it is stored by the next `write_later`."""
        self.writes.amend(replace(self.model(name), **changes))

    async def write_later(self) -> None:
        """Stores what was changed and is not stored yet; see `RowWrites.write_later`."""
        await self.writes.write_later()
