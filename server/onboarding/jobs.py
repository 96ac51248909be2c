"""Runs onboarding jobs, one after the other, from a queued request to a resident model.

The event loop owns all state here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linker_core.errors import ConflictError, EngineFailureError, LinkerError, NotReadyError
from linker_core.weights.checkpoint import Identity
from server.metrics.admission import AdmissionMetrics
from server.onboarding.adapters import Source
from server.onboarding.admission import Admission, Arrival
from server.onboarding.donors import Donors
from server.onboarding.outcomes import failed_job, failed_model, retimed_job, succeeded_job
from server.onboarding.planner import OnStage, Planned, Planner, as_progress
from server.onboarding.prepare import read_again
from server.onboarding.replans import Replans
from server.onboarding.request import OnboardRequest
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.onboarding.sources import resolve_source
from server.onboarding.timing import Stopwatch
from server.registry.records import JobRecord, JobStage, JobStatus, ModelRecord, ModelState
from server.residency.catalog import Catalog, ServedModel
from server.settings import SharingSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was looked at before a job was accepted."""

    identity: Identity  # of the weight files
    seconds: float  # that took


class JobRunner:
    """The jobs that wait and the one that runs.

    Args:
        roster: The known models and jobs.
        catalog: Filled with what is resident.
        planner: Decides what is stored.
        admission: Loads what was planned.
        restorer: Says when donors are resident.
        metrics: Told how admissions end and what they spent.
        roots: Directories that sources must lie in.
        names: Guards checks of names and donors together with the changes that follow from them.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        planner: Planner,
        admission: Admission,
        restorer: Restorer,
        metrics: AdmissionMetrics,
        roots: Sequence[Path],
        names: asyncio.Lock,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._donors = Donors(catalog=catalog, comparisons=planner.comparisons)
        self._planner = planner
        self._admission = admission
        self._restorer = restorer
        self._metrics = metrics
        self._roots = tuple(roots)
        self._names = names
        self._finished: dict[str, asyncio.Event] = {}
        self._checked: dict[str, Checked] = {}  # by job
        self._replanned: dict[str, str] = {}  # ready models that get another plan -> job
        self._replans = Replans(
            roster=roster,
            catalog=catalog,
            planner=planner,
            admission=admission,
            restorer=restorer,
        )
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()  # None: room may have come free

    @property
    def num_live(self) -> int:
        """Jobs that wait or run."""
        return len(self._finished)

    async def enqueue(
        self,
        request: OnboardRequest,
        *,
        job: JobRecord | None = None,
        checked: Checked | None = None,
    ) -> JobRecord:
        """Stores a job, a new one or an interrupted one, and lets it wait for its turn."""
        queued = await self._roster.queue(request, job=job)
        self._finished[queued.id] = asyncio.Event()
        if checked is not None:
            self._checked[queued.id] = checked
        self._queue.put_nowait(queued.id)
        return queued

    async def replan(
        self, name: str, said: Mapping[str, Any], defaults: SharingSettings
    ) -> JobRecord:
        """Queues another plan for a resident model.

        Returns:
            The job; where the model has just that plan, or is getting it, the one that did or does.

        Raises:
            LinkerError: See `Replans.asked`; or another re-plan of it is under way.
        """
        request = self._replans.asked(name, said, defaults)
        if (running := self._replanned.get(name)) is not None:
            job = self._roster.live_job(running)
            if job.request != request.to_json():
                raise ConflictError(f"The model {name!r} is being planned anew; try again then.")
            return job
        if request.to_json() == self._roster.model(name).request:
            return await self._roster.newest_job(name)
        job = await self._roster.queue_replan(request)
        self._finished[job.id] = asyncio.Event()
        self._replanned[name] = job.id
        self._queue.put_nowait(job.id)
        return job

    def is_replanning(self, name: str) -> bool:
        """Whether a ready model waits for another plan."""
        return name in self._replanned

    def catch_up_soon(self) -> None:
        """Tries again, after what is queued, to bring back what had no room; see `Restorer`."""
        self._queue.put_nowait(None)

    async def wait(self, job_id: str) -> JobRecord:
        """Waits for the end of a job."""
        finished = self._finished.get(job_id)
        if finished is not None:
            await finished.wait()
        job = await self._roster.job(job_id)
        assert job is not None
        return job

    async def run(self) -> None:
        """Runs the jobs until cancelled.

        A job that is cancelled here stays in the registry as it is; the next start finishes it.
        """
        while True:
            job_id = await self._queue.get()
            if job_id is not None:
                await self._run_job(job_id)
            await self._restorer.catch_up()
            if job_id is None:
                await self.sweep()  # a dry run may have left something

    async def sweep(self) -> None:
        """Removes stored deltas that no model needs."""
        idle = not self._planner.turn.locked()
        await self._admission.deltas.sweep(self._roster.plans(), settled=idle)

    async def _run_job(self, job_id: str) -> None:
        job = self._roster.live_job(job_id)
        try:
            if self._replanned.get(job.model) == job_id:
                await self._replan(job)
            else:
                await self._admit(job)
        except LinkerError as error:
            await self._fail(job_id, error)
        except Exception:
            logger.exception("onboarding %s failed through a fault of ours", job.model)
            await self._fail(job_id, EngineFailureError("Onboarding failed; see the server's log."))
        self._checked.pop(job_id, None)
        if self._replanned.get(job.model) == job_id:
            del self._replanned[job.model]
        await self.sweep()
        self._finished.pop(job_id).set()

    async def _replan(self, job: JobRecord) -> None:
        await self._roster.save(replace(job, status=JobStatus.RUNNING))
        await self._replans.run(job.id, on_stage=self._note_stage(job.id))

    async def _admit(self, job: JobRecord) -> None:
        await self._roster.save(replace(job, status=JobStatus.RUNNING))
        request, watch = OnboardRequest.from_json(job.request), Stopwatch()
        source = await self._open(job, request, watch)
        # Held until it is loaded: the tuner of a dry run would take the room meanwhile.
        async with self._planner.turn:
            record, planned, arrival = await self._plan_and_load(job, request, source, watch)
        watch.add("alias", arrival.alias_seconds)
        watch.add("move", arrival.move_seconds)
        await self._publish(job.id, record, planned, arrival.model, watch)

    async def _plan_and_load(
        self, job: JobRecord, request: OnboardRequest, source: Source, watch: Stopwatch
    ) -> tuple[ModelRecord, Planned, Arrival]:
        on_stage = self._note_stage(job.id)
        record, donor = await self._choose_donor(request, source, watch, on_stage)
        planned = await self._planner.plan(request, source, donor, watch=watch, on_stage=on_stage)
        record = replace(record, fingerprint=planned.fingerprint, plan=planned.plan.to_json())
        on_stage(JobStage.LOADING, 0, planned.plan.unique_bytes)
        await self._roster.save(record, self._roster.live_job(job.id))
        weights = await self._admission.deltas.weights(
            planned.plan,
            planned.text,
            donor,
            watch=watch,
            on_progress=lambda _, done, total: on_stage(JobStage.LOADING, done, total),
        )
        await self._restorer.engine()  # of the moment, or the next one
        arrival = await self._admission.load(
            record,
            planned.text,
            planned.plan,
            weights,
            on_progress=lambda done, total: on_stage(JobStage.LOADING, done, total),
        )
        return record, planned, arrival

    def _note_stage(self, job_id: str) -> OnStage:
        """Returns a callback that shows how far a job is."""

        def on_stage(stage: JobStage, done_bytes: int, total_bytes: int) -> None:
            live = self._roster.live_job(job_id)
            self._roster.note_progress(
                replace(live, stage=stage, done_bytes=done_bytes, total_bytes=total_bytes)
            )

        return on_stage

    async def _open(self, job: JobRecord, request: OnboardRequest, watch: Stopwatch) -> Source:
        checked = self._checked.get(job.id)
        if checked is not None:
            watch.add("open", checked.seconds)
        watch.enter("open")
        identity = None if checked is None else checked.identity
        source = await asyncio.to_thread(self._read_checked, request.source, identity)
        watch.stop()
        return source

    async def _publish(
        self,
        job_id: str,
        record: ModelRecord,
        planned: Planned,
        served: ServedModel,
        watch: Stopwatch,
    ) -> None:
        """Opens a loaded model to requests and stores that it is; takes it back if it cannot."""
        watch.enter("ready")
        self._catalog.publish(served)
        ready = replace(record, state=ModelState.READY, max_model_len=served.max_model_len)
        job = succeeded_job(
            self._roster.live_job(job_id),
            planned.plan,
            watch.to_json(),
            donor_choice=record.donor_choice,
        )
        try:
            await self._roster.save(ready, job)
        except NotReadyError:
            self._catalog.retract(record.name)
            await self._admission.unload(record.name)
            raise
        watch.stop()
        await self._roster.settle(retimed_job(job, watch.to_json()))
        self._metrics.succeeded(watch.spent)
        logger.info("model %s is ready", record.name)

    def _read_checked(self, source: str, identity: Identity | None) -> Source:
        """Reads what the request was checked against, or refuses what has taken its place."""
        if identity is None:  # accepted in an earlier life of the server, maybe under other roots
            return read_again(Path(source), source=source)
        path = resolve_source(source, self._roots)
        return read_again(path, source=source, identity=identity)

    async def _choose_donor(
        self, request: OnboardRequest, source: Source, watch: Stopwatch, on_stage: OnStage
    ) -> tuple[ModelRecord, ServedModel | None]:
        """Chooses the donor once all are resident; from here on it cannot be deleted."""
        while True:
            await self._restorer.done.wait()
            await self._donors.compare(
                request, source, watch=watch, on_progress=as_progress(on_stage)
            )
            async with self._names:
                if not self._restorer.done.is_set():
                    continue  # the engine died while others held the names
                choice = self._donors.choose(request, source)
                if choice is None:
                    continue  # a donor came while the others were looked at
                donor = choice.donor
                record = replace(
                    self._roster.model(request.name),
                    donor=None if donor is None else donor.name,
                    family=request.name if donor is None else donor.name,
                    donor_choice=choice.to_json(),
                )
                await self._roster.save(record)
                return record, donor

    async def _fail(self, job_id: str, error: LinkerError) -> None:
        job = self._roster.live_job(job_id)
        if self._replanned.get(job.model) == job_id:
            logger.warning("model %s keeps its plan: %s", job.model, error.message)
            await self._roster.settle(failed_job(job, error))
            return
        logger.warning("onboarding %s failed: %s", job.model, error.message)
        # It holds nothing, so its donor may go.
        model = replace(failed_model(self._roster.model(job.model), error), donor=None)
        await self._roster.settle(model, failed_job(job, error))
        self._metrics.failed()
