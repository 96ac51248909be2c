"""Runs jobs, one after the other, each in a task of its own that may be cancelled.

The event loop owns all state here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from linker_core.errors import (
    ConflictError,
    EngineFailureError,
    LinkerError,
    ModelNotFoundError,
)
from server.metrics.admission import AdmissionMetrics
from server.onboarding.admission import Admission
from server.onboarding.arrivals import Arrivals, Checked
from server.onboarding.hub.source import is_hub_source
from server.onboarding.outcomes import failed_job, failed_model
from server.onboarding.planner import OnStage, Planner
from server.onboarding.replans import Replans
from server.onboarding.replays import Once
from server.onboarding.request import OnboardRequest
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.registry.records import JobRecord, JobStage, JobStatus, ModelState
from server.settings import SharingSettings

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Live:
    """A job that waits or runs."""

    checked: Checked | None = None
    replans: bool = False  # a ready model, which keeps its plan until then
    unwanted: bool = False  # cancelled
    work: asyncio.Task[None] | None = None  # None: it waits
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class JobRunner:
    """The jobs that wait and the one that runs.

    Args:
        roster: The known models and jobs.
        planner: Has the turn of whoever plans.
        admission: Takes a withdrawn model out of the engine.
        restorer: Brings back what had no room.
        arrivals: Onboards.
        replans: Plans anew.
        metrics: Told how admissions end.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        planner: Planner,
        admission: Admission,
        restorer: Restorer,
        arrivals: Arrivals,
        replans: Replans,
        metrics: AdmissionMetrics,
    ) -> None:
        self._roster = roster
        self._planner = planner
        self._admission = admission
        self._restorer = restorer
        self._bases = restorer.returning.bases
        self._sources = restorer.returning.sources
        self._arrivals = arrivals
        self._replans = replans
        self._metrics = metrics
        self._live: dict[str, _Live] = {}  # by id
        self._prepared: dict[str, _Live] = {}  # models that are not ready to wait for their turn
        self._beside: set[asyncio.Task[None]] = set()  # what goes on beside the queue
        self._replanned: dict[str, str] = {}  # ready models that get another plan -> job
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()  # None: room may have come free

    @property
    def num_live(self) -> int:
        """Jobs that wait or run."""
        return len(self._live)

    async def enqueue(
        self,
        request: OnboardRequest,
        *,
        job: JobRecord | None = None,
        checked: Checked | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        once: Once | None = None,
    ) -> JobRecord:
        """Stores a job, a new one or an interrupted one, and lets it wait for its turn.

        What is on the hub is downloaded before, several at once, and whoever names a donor that is
        being downloaded waits for that.
        """
        queued = await self._roster.queue(request, job=job, options=options, once=once)
        live = self._live[queued.id] = _Live(checked=checked)
        donor = self._prepared.get(request.donor or "")
        if is_hub_source(request.source) or donor is not None:
            self._prepared[request.name] = live
            self._go_on_with(self._prepare(queued.id, live, request, donor))
        else:
            self._queue.put_nowait(queued.id)
        return queued

    def check_replan(
        self, name: str, said: Mapping[str, Any], defaults: SharingSettings
    ) -> OnboardRequest:
        """Returns what `replan` would do.

        Raises:
            LinkerError: See `Replans.asked`; or another re-plan of it is under way.
        """
        request = self._replans.asked(name, said, defaults)
        running = self._replanned.get(name)
        if running is not None and self._roster.live_job(running).request != request.to_json():
            raise ConflictError(f"The model {name!r} is being planned anew; try again then.")
        return request

    async def replan(
        self,
        name: str,
        said: Mapping[str, Any],
        defaults: SharingSettings,
        *,
        once: Once | None = None,
    ) -> JobRecord:
        """Queues another plan for a resident model.

        Returns:
            The job; where the model has just that plan, or is getting it, the one that did or does.

        Raises:
            LinkerError: See `check_replan`.
        """
        request = self.check_replan(name, said, defaults)
        if (running := self._replanned.get(name)) is not None:
            return self._roster.live_job(running)
        if request.to_json() == self._roster.model(name).request:
            return await self._roster.newest_job(name)
        job = await self._roster.queue_replan(request, once=once)
        self._live[job.id] = _Live(replans=True)
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
        live = self._live.get(job_id)
        if live is not None:
            await live.ended.wait()
        job = await self._roster.job(job_id)
        assert job is not None
        return job

    async def cancel(self, job_id: str) -> JobRecord:
        """Ends a job at whatever stage it is, and undoes what it has begun.

        A model that was to be onboarded is gone afterwards; one that was to be planned anew keeps
        its plan. Once this has returned, no restart takes the job up again.

        Raises:
            ModelNotFoundError: There is no such job.
            ConflictError: It has ended, or models that were ready before wait for its model.
            NotReadyError: The registry cannot be written; the job goes on.
            EngineFailureError: It could not be ended, through a fault of ours.
        """
        live = self._live.get(job_id)
        if live is not None:
            await self._stop(job_id, live)
        job = await self._roster.job(job_id)
        if job is None:
            raise ModelNotFoundError("There is no such job.", param="id")
        if live is not None and self._roster.is_open(job_id):
            raise EngineFailureError("The job could not be ended; see the server's log.")
        if live is None or job.status is not JobStatus.CANCELLED:
            raise ConflictError(f"The job has ended already: it has {job.status.value}.")
        return job

    async def _stop(self, job_id: str, live: _Live) -> None:
        """Has a job end, and waits for that."""
        async with self._roster.names:
            if not live.unwanted and self._roster.is_open(job_id):
                if not live.replans:
                    self._check_unneeded(self._roster.live_job(job_id).model)
                live.unwanted = await self._roster.mark_unwanted(job_id)
                if live.unwanted and live.work is not None:
                    live.work.cancel()
                elif live.unwanted:
                    live.work = self._go_on_with(self._conclude(job_id, live))
        await live.ended.wait()

    async def run(self) -> None:
        """Runs the jobs until cancelled.

        A job that is cancelled here stays in the registry as it is; the next start finishes it.
        """
        try:
            while True:
                job_id = await self._queue.get()
                live = None if job_id is None else self._live.get(job_id)
                if job_id is not None and live is not None and not live.unwanted:
                    await self._run_job(job_id, live)
                await self._restorer.catch_up()
                if job_id is None:
                    await self.sweep()  # a dry run may have left something
        finally:
            for task in (beside := list(self._beside)):
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def sweep(self) -> None:
        """Removes stored deltas, bases and downloads that no model needs.

        What cannot be removed now stays for a later sweep: nobody's request depends on it.
        """
        try:
            await self._sweep()
        except (LinkerError, OSError) as error:
            logger.warning("what no model needs stays for now: %s", error)

    async def _sweep(self) -> None:
        idle = not self._planner.turn.locked()
        await self._admission.deltas.sweep(self._roster.plans(), settled=idle)
        await self._bases.sweep(self._roster.plans)
        # A donor's checkpoint that becomes a base meanwhile is among either.
        before = self._sources_of_models()
        bases = await self._bases.sources()
        await self._sources.sweep(lambda: [*before, *bases, *self._sources_of_models()])

    def _sources_of_models(self) -> list[str]:
        return [model.source for model in self._roster.models()]

    def _go_on_with(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins work that nobody awaits; a fault of ours in it is logged."""
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._beside.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a job could not be ended", exc_info=error)

    async def _prepare(
        self, job_id: str, live: _Live, request: OnboardRequest, donor: _Live | None
    ) -> None:
        """Downloads a job's source, waits for its donor's job, and lets it wait for its turn."""
        error = await self._until_done(live, self._fetch(job_id, request, donor))
        if self._prepared.get(request.name) is live:
            del self._prepared[request.name]
        if live.unwanted or error is not None:
            await self._conclude(job_id, live, error)
        else:
            live.work = None
            self._queue.put_nowait(job_id)

    async def _fetch(self, job_id: str, request: OnboardRequest, donor: _Live | None) -> None:
        if is_hub_source(request.source):
            await self._begin(job_id)
            note = self._note_stage(job_id)
            await self._sources.path(
                request.source,
                on_progress=lambda done, total: note(JobStage.VALIDATING, done, total),
            )
        if donor is not None:
            await donor.ended.wait()

    async def _run_job(self, job_id: str, live: _Live) -> None:
        """Does a job's work, and ends it."""
        error = await self._until_done(live, self._do(job_id, live))
        await self._conclude(job_id, live, error)

    async def _until_done(
        self, live: _Live, work: Coroutine[Any, Any, None]
    ) -> BaseException | None:
        """Returns how work has ended, in a task of its own so that a job can end alone."""
        task = live.work = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # the server stops
            task.cancel()
            await asyncio.wait({task})
            raise
        return None if task.cancelled() else task.exception()

    async def _conclude(self, job_id: str, live: _Live, error: BaseException | None = None) -> None:
        """Ends a job whose work has stopped, and lets those who wait for it go on."""
        try:
            await self._end(job_id, live, error)
            await self.sweep()
        finally:
            for name in [name for name, job in self._replanned.items() if job == job_id]:
                del self._replanned[name]
            self._live.pop(job_id).ended.set()

    async def _end(self, job_id: str, live: _Live, error: BaseException | None) -> None:
        """Stores how a job ended, unless it has succeeded and said so itself."""
        if not self._roster.is_open(job_id):
            assert error is None  # it has succeeded
        elif live.unwanted:
            await self._withdraw(job_id, live)
        elif isinstance(error, LinkerError):
            await self._fail(job_id, live, error)
        else:
            logger.error("job %s failed through a fault of ours", job_id, exc_info=error)
            known = EngineFailureError("Onboarding failed; see the server's log.")
            await self._fail(job_id, live, known)

    async def _begin(self, job_id: str) -> JobRecord:
        job = replace(self._roster.live_job(job_id), status=JobStatus.RUNNING)
        await self._roster.save(job)
        return job

    async def _do(self, job_id: str, live: _Live) -> None:
        job = await self._begin(job_id)
        on_stage = self._note_stage(job_id)
        if live.replans:
            await self._replans.run(job_id, on_stage=on_stage)
        else:
            await self._arrivals.run(job, live.checked, on_stage=on_stage)

    def _note_stage(self, job_id: str) -> OnStage:
        """Returns a callback that shows how far a job is."""

        def on_stage(stage: JobStage, done_bytes: int, total_bytes: int) -> None:
            live = self._roster.live_job(job_id)
            self._roster.note_progress(
                replace(live, stage=stage, done_bytes=done_bytes, total_bytes=total_bytes)
            )

        return on_stage

    async def _fail(self, job_id: str, live: _Live, error: LinkerError) -> None:
        job = self._roster.live_job(job_id)
        if live.replans:
            logger.warning("model %s keeps its plan: %s", job.model, error.message)
            await self._roster.settle(failed_job(job, error))
            return
        logger.warning("onboarding %s failed: %s", job.model, error.message)
        # It holds nothing, so its donor may go.
        model = replace(failed_model(self._roster.model(job.model), error), donor=None)
        await self._roster.settle(model, failed_job(job, error))
        self._metrics.failed()

    async def _withdraw(self, job_id: str, live: _Live) -> None:
        """Ends a cancelled job whose work has stopped."""
        job = self._roster.live_job(job_id)
        if not live.replans and job.stage is JobStage.LOADING and self._restorer.done.is_set():
            await self._admission.unload(job.model)  # it may have come just before
        async with self._roster.names:
            await self._roster.withdraw(job)
        logger.info("job %s of model %s was cancelled", job_id, job.model)
        if not live.replans:
            self._metrics.cancelled()

    def _check_unneeded(self, name: str) -> None:
        """Refuses to give up a model that others, which were ready before, wait for.

        Raises:
            ConflictError: There are some.
        """
        waiting = [
            model
            for model in self._roster.dependants(name)
            if self._roster.model(model).state is not ModelState.ONBOARDING
        ]
        if waiting:
            raise ConflictError(
                f"The model {name!r} is the donor of {', '.join(waiting)}, which wait for it to "
                "come back; delete those first."
            )
