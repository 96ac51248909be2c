"""Takes onboarding requests and runs their jobs, one by one; deletes models.

The event loop owns all state here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from linker_core.errors import ConflictError, EngineFailureError, LinkerError, QueueFullError
from server.bridge.client import EngineClient
from server.onboarding.admission import Admission
from server.onboarding.catalog import Catalog, TextSide
from server.onboarding.prepare import check_capacity, read_text_side
from server.onboarding.request import AUTO_DONOR, OnboardRequest, check_name, check_sharing
from server.onboarding.restorer import Restorer
from server.onboarding.roster import (
    Roster,
    failed_job,
    failed_model,
    interrupted_job,
    succeeded_job,
)
from server.onboarding.sources import resolve_source
from server.registry.records import JobRecord, JobStage, JobStatus, ModelState

logger = logging.getLogger(__name__)

_FLUSH_S = 5.0


class Onboarder:
    """Jobs and what starts and undoes them.

    Args:
        roster: The known models and jobs.
        catalog: Filled with what is resident.
        admission: The steps of a job.
        restorer: Says when donors are resident.
        roots: Directories that sources must lie in.
        queue_limit: Jobs waiting or running.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        admission: Admission,
        restorer: Restorer,
        roots: Sequence[Path],
        queue_limit: int,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._admission = admission
        self._restorer = restorer
        self._roots = tuple(roots)
        self._queue_limit = queue_limit
        self._finished: dict[str, asyncio.Event] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._submitting = asyncio.Lock()  # guards the check and the insertion of a name
        self._leaving: set[str] = set()  # deleted, but not yet out of the engine
        self._startup: frozenset[str] = frozenset()

    # --- the start ----------------------------------------------------------------------------

    async def open(self, startup: Sequence[OnboardRequest]) -> None:
        """Reads the registry and queues what is to be done, before the engine runs.

        A start-up model whose stored row was made from the same request keeps its plan; another
        row of that name is replaced, and the variants of a replaced donor are planned anew.
        """
        interrupted = await self._roster.open()
        stored, requests = self._roster.models(), {request.name: request for request in startup}
        again = {name for name, request in requests.items() if not self._is_stored(request)}
        again |= {r.name for r in stored if r.donor in again and r.name not in requests}
        again |= {r.name for r in stored if r.state is ModelState.ONBOARDING}
        for record in stored:
            if record.name in again and record.name not in requests:
                requests[record.name] = OnboardRequest.from_json(record.request)
        newest = {job.model: job for job in reversed(interrupted) if job.model in again}
        for job in interrupted:
            if newest.get(job.model) is not job:
                await self._roster.save(interrupted_job(job))
        for name in (name for name in requests if name in again):
            await self._enqueue(requests[name], job=newest.get(name))
        models = self._roster.models()
        self._startup = frozenset(r.name for r in models if r.state is not ModelState.FAILED)

    def startup_failures(self) -> list[str] | None:
        """Returns the start-up models that failed; None while some are still on their way."""
        failed = []
        for record in self._roster.models():
            if record.name not in self._startup:
                continue
            if record.state is ModelState.FAILED:
                failed.append(record.name)
            elif self._catalog.get(record.name) is None:
                return None
        return failed

    def _is_stored(self, request: OnboardRequest) -> bool:
        stored = self._roster.find(request.name)
        return (
            stored is not None
            and stored.state is ModelState.READY
            and stored.request == request.to_json()
        )

    # --- requests -----------------------------------------------------------------------------

    async def submit(self, request: OnboardRequest) -> JobRecord:
        """Checks what can be checked at once and queues the rest.

        Returns:
            The job; of an identical request that is under way or done, the same one.

        Raises:
            LinkerError: Name, source, checkpoint, donor or capacity rule the model out, the name
                is taken by other content, or too many jobs wait.
        """
        check_name(request.name)
        check_sharing(request)
        path = await asyncio.to_thread(resolve_source, request.source, self._roots)
        request = replace(request, source=str(path))
        async with self._submitting:
            same = await self._identical(request)
            if same is not None:
                return same
            if len(self._finished) >= self._queue_limit:
                raise QueueFullError("Too many models are being onboarded; try again later.")
            text = await asyncio.to_thread(read_text_side, path)
            self._check_admissible(request, text)
            return await self._enqueue(request)

    async def wait(self, job_id: str) -> JobRecord:
        """Waits for the end of a job."""
        finished = self._finished.get(job_id)
        if finished is not None:
            await finished.wait()
        job = await self._roster.job(job_id)
        assert job is not None
        return job

    async def delete(self, name: str, *, engine: EngineClient | None) -> None:
        """Forgets a model: new requests are refused, running ones finish, its bytes are freed.

        Raises:
            ModelNotFoundError: There is none of that name.
            ConflictError: It is being onboarded, or other models lean on it.
        """
        record = self._roster.model(name)
        if record.state is ModelState.ONBOARDING:
            raise ConflictError(f"The model {name!r} is being onboarded; delete it afterwards.")
        dependants = self._roster.dependants(name)
        if dependants:
            raise ConflictError(
                f"The model {name!r} is the donor of {', '.join(dependants)}; delete those first."
            )
        resident = self._catalog.get(name) is not None
        self._catalog.retract(name)
        await self._roster.forget(name)
        if resident and engine is not None:
            self._leaving.add(name)
            try:
                await engine.unload(name)
            except EngineFailureError:
                logger.info("the engine ended before it had unloaded %s", name)
            finally:
                self._leaving.discard(name)

    async def _identical(self, request: OnboardRequest) -> JobRecord | None:
        """Returns the job of an identical request; refuses other content of the same name."""
        if request.name in self._leaving:
            raise ConflictError(
                f"The model {request.name!r} is being deleted; try again afterwards."
            )
        record = self._roster.find(request.name)
        if record is None or record.state is ModelState.FAILED:
            return None
        if record.request != request.to_json():
            raise ConflictError(
                f"The model {request.name!r} exists with another source or other options. "
                "Delete it first, or choose another name.",
                param="name",
            )
        return (await self._roster.jobs(model=request.name))[0]

    def _check_admissible(self, request: OnboardRequest, text: TextSide) -> None:
        donor_record = self._roster.find(request.donor or "")
        if donor_record is not None and donor_record.state is ModelState.ONBOARDING:
            return  # its turn comes first; the job checks it then
        donor = self._admission.choose_donor(request, text.config)
        waiting_donor = request.donor == AUTO_DONOR and self._finished
        snapshot = self._admission.snapshot()
        if donor is None and not waiting_donor and snapshot is not None:
            check_capacity(text.checkpoint_bytes, snapshot.device_free_bytes)

    async def _enqueue(self, request: OnboardRequest, *, job: JobRecord | None = None) -> JobRecord:
        queued = await self._roster.queue(request, job=job)
        self._finished[queued.id] = asyncio.Event()
        self._queue.put_nowait(queued.id)
        return queued

    # --- jobs ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the jobs, one after the other, until cancelled.

        A job that is cancelled here stays in the registry as it is; the next start finishes it.
        """
        while True:
            job_id = await self._queue.get()
            job = self._roster.live_job(job_id)
            try:
                await self._admit(job)
            except LinkerError as error:
                await self._fail(job_id, error)
            except Exception:
                logger.exception("onboarding %s failed through a fault of ours", job.model)
                await self._fail(
                    job_id, EngineFailureError("Onboarding failed; see the server's log.")
                )
            self._finished.pop(job_id).set()

    async def flush(self) -> None:
        """Writes down when models were used, now and then, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self.flush_once()

    async def flush_once(self) -> None:
        """Writes down when models were used since the last time."""
        await self._roster.note_use(self._catalog.take_used())

    async def _admit(self, job: JobRecord) -> None:
        job = replace(job, status=JobStatus.RUNNING)
        await self._roster.save(job)
        await self._restorer.done.wait()  # donors are resident from here on

        def on_stage(stage: JobStage, done_bytes: int, total_bytes: int) -> None:
            live = self._roster.live_job(job.id)
            self._roster.note_progress(
                replace(live, stage=stage, done_bytes=done_bytes, total_bytes=total_bytes)
            )

        request = OnboardRequest.from_json(job.request)
        planned = await self._admission.plan(request, on_stage)
        record = replace(
            self._roster.model(job.model),
            donor=None if planned.donor is None else planned.donor.name,
            family=request.name if planned.donor is None else planned.donor.name,
            fingerprint=planned.fingerprint,
            plan=planned.plan.to_json(),
        )
        on_stage(JobStage.LOADING, 0, planned.plan.unique_bytes)
        await self._roster.save(record, self._roster.live_job(job.id))
        served = await self._admission.load(
            record,
            planned.text,
            planned.plan,
            on_progress=lambda done, total: on_stage(JobStage.LOADING, done, total),
        )
        ready = replace(record, state=ModelState.READY, max_model_len=served.max_model_len)
        await self._roster.save(ready, succeeded_job(self._roster.live_job(job.id), planned.plan))
        self._catalog.publish(served)
        logger.info("model %s is ready", job.model)

    async def _fail(self, job_id: str, error: LinkerError) -> None:
        job = self._roster.live_job(job_id)
        logger.warning("onboarding %s failed: %s", job.model, error.message)
        model = failed_model(self._roster.model(job.model), error)
        await self._roster.save(model, failed_job(job, error))
