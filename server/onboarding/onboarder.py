"""Which models there are: takes requests, runs their jobs one by one, brings models back.

The event loop owns all state here; rows are written through threads before anyone is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from linker_core.errors import (
    BadCheckpoint,
    Conflict,
    EngineFailure,
    LinkerError,
    ModelNotFound,
    QueueFull,
)
from linker_core.sharing.plan import SharePlan
from server.bridge.client import EngineClient
from server.metrics.serving import ServingMetrics
from server.onboarding.admission import Admission
from server.onboarding.catalog import Catalog, TextSide
from server.onboarding.prepare import check_capacity, read_text_side
from server.onboarding.request import AUTO_DONOR, OnboardRequest, check_name, check_sharing
from server.onboarding.sources import resolve_source
from server.registry.records import JobRecord, JobStage, JobStatus, ModelRecord, ModelState
from server.registry.store import Registry

logger = logging.getLogger(__name__)

_CRASHES_PER_MODEL = 2  # that many engine deaths while loading a stored model mark it failed
_FLUSH_S = 5.0


class Onboarder:
    """Models and their jobs.

    Args:
        registry: What survives a restart.
        catalog: Filled with what is resident.
        admission: The steps of a job.
        metrics: Told which models exist.
        roots: Directories that sources must lie in.
        queue_limit: Jobs waiting or running.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        catalog: Catalog,
        admission: Admission,
        metrics: ServingMetrics,
        roots: Sequence[Path],
        queue_limit: int,
    ) -> None:
        self._registry = registry
        self._catalog = catalog
        self._admission = admission
        self._metrics = metrics
        self._roots = tuple(roots)
        self._queue_limit = queue_limit
        self._models: dict[str, ModelRecord] = {}
        self._jobs: dict[str, JobRecord] = {}  # of this process's life
        self._finished: dict[str, asyncio.Event] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._submitting = asyncio.Lock()  # guards the check and the insertion of a name
        self._restored = asyncio.Event()  # the engine holds every model it should
        self._leaving: set[str] = set()  # deleted, but not yet out of the engine
        self._restoring: str | None = None
        self._strikes: dict[str, int] = {}
        self._startup: frozenset[str] = frozenset()

    # --- what there is ------------------------------------------------------------------------

    def models(self) -> list[ModelRecord]:
        """Returns every known model in order of arrival."""
        return sorted(self._models.values(), key=lambda model: model.position)

    def model(self, name: str) -> ModelRecord:
        """Returns one model.

        Raises:
            ModelNotFound: There is none of that name.
        """
        record = self._models.get(name)
        if record is None:
            raise ModelNotFound(f"The model {name[:200]!r} does not exist.", param="model")
        return record

    async def job(self, job_id: str) -> JobRecord | None:
        """Returns one job, or None."""
        return self._jobs.get(job_id) or await asyncio.to_thread(self._registry.job, job_id)

    async def jobs(self) -> list[JobRecord]:
        """Returns every job, the newest first."""
        stored = await asyncio.to_thread(self._registry.jobs)
        return [self._jobs.get(job.id, job) for job in stored]

    def startup_failures(self) -> list[str] | None:
        """Returns the start-up models that failed; None while some are still on their way."""
        failed = []
        for name in self._startup & self._models.keys():
            if self._models[name].state is ModelState.FAILED:
                failed.append(name)
            elif self._catalog.get(name) is None:
                return None
        return sorted(failed)

    # --- the start ----------------------------------------------------------------------------

    async def open(self, startup: Sequence[OnboardRequest]) -> None:
        """Reads the registry and queues what is to be done, before the engine runs.

        A start-up model whose stored row was made from the same request keeps its plan; another
        row of that name is replaced, and the variants of a replaced donor are planned anew.
        """
        for record in await asyncio.to_thread(self._registry.models):
            self._models[record.name] = record
            self._metrics.add_model(record.name)
        requests = {request.name: request for request in startup}
        again = {name for name, request in requests.items() if not self._is_stored(request)}
        again |= {r.name for r in self.models() if r.donor in again and r.name not in requests}
        again |= {r.name for r in self.models() if r.state is ModelState.ONBOARDING}
        open_jobs = await self._open_jobs()
        order = [*requests, *(record.name for record in self.models())]
        for name in sorted(again, key=order.index):
            request = requests.get(name)
            if request is None:
                request = OnboardRequest.from_json(self._models[name].request)
            await self._enqueue(request, job=open_jobs.pop(name, None))
        for job in open_jobs.values():
            await self._save(_interrupted(job))
        kept = {name for name, r in self._models.items() if r.state is not ModelState.FAILED}
        self._startup = frozenset(kept | requests.keys())

    async def _open_jobs(self) -> dict[str, JobRecord]:
        """Returns the jobs that the last stop interrupted, by model."""
        jobs = await asyncio.to_thread(self._registry.jobs)
        return {job.model: job for job in jobs if job.finished_at is None}

    def _is_stored(self, request: OnboardRequest) -> bool:
        stored = self._models.get(request.name)
        return (
            stored is not None
            and stored.state is ModelState.READY
            and stored.request == request.to_json()
        )

    async def restore(self, _client: EngineClient) -> None:
        """Brings back every model that was ready, with its stored plan; donors come first.

        One broken model is marked failed and does not stop the others. Called with every new
        engine, and cancelled when that engine dies.
        """
        if self._restoring is not None:
            await self._strike(self._restoring)
        ready = [r for r in self._models.values() if r.state is ModelState.READY]
        ready.sort(key=lambda r: (r.donor is not None, -(r.last_used_at or r.created_at)))
        for record in ready:
            self._restoring = record.name
            try:
                await self._restore_one(record)
            except EngineFailure:
                return  # the engine is gone; the next one begins anew
            except LinkerError as error:
                logger.error("model %s cannot be restored: %s", record.name, error.message)
                await self._save(_failed(record, error))
            self._restoring = None
        self._restored.set()

    async def _restore_one(self, record: ModelRecord) -> None:
        text = await asyncio.to_thread(read_text_side, Path(record.source))
        fingerprint = await self._admission.fingerprint(text)
        if fingerprint != record.fingerprint:
            raise BadCheckpoint(
                "The model's files are not the ones it was onboarded from. Restore them, or "
                "delete the model and onboard it again."
            )
        assert record.plan is not None
        plan = SharePlan.from_json(dict(record.plan))
        served = await self._admission.load(record, text, plan)
        self._catalog.publish(served)

    async def _strike(self, name: str) -> None:
        self._strikes[name] = self._strikes.get(name, 0) + 1
        record = self._models.get(name)
        if record is not None and self._strikes[name] >= _CRASHES_PER_MODEL:
            error = EngineFailure("The engine died repeatedly while it loaded this model.")
            await self._save(_failed(record, error))
        self._restoring = None

    def engine_down(self) -> None:
        """Closes every model to requests until the next engine has them."""
        self._restored.clear()
        self._catalog.clear()

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
                raise QueueFull("Too many models are being onboarded; try again later.")
            text = await asyncio.to_thread(read_text_side, path)
            self._check_admissible(request, text)
            return await self._enqueue(request)

    async def wait(self, job_id: str) -> JobRecord:
        """Waits for the end of a job."""
        finished = self._finished.get(job_id)
        if finished is not None:
            await finished.wait()
        job = await self.job(job_id)
        assert job is not None
        return job

    async def delete(self, name: str, *, engine: EngineClient | None) -> None:
        """Forgets a model: new requests are refused, running ones finish, its bytes are freed.

        Raises:
            ModelNotFound: There is none of that name.
            Conflict: It is being onboarded, or other models lean on it.
        """
        record = self.model(name)
        if record.state is ModelState.ONBOARDING:
            raise Conflict(f"The model {name!r} is being onboarded; delete it afterwards.")
        dependants = [other.name for other in self.models() if other.donor == name]
        if dependants:
            raise Conflict(
                f"The model {name!r} is the donor of {', '.join(dependants)}; delete those first."
            )
        resident = self._catalog.get(name) is not None
        self._catalog.retract(name)
        await asyncio.to_thread(self._registry.delete_model, name)
        del self._models[name]
        self._metrics.remove_model(name)
        if resident and engine is not None:
            self._leaving.add(name)
            try:
                await engine.unload(name)
            except EngineFailure:
                logger.info("the engine ended before it had unloaded %s", name)
            finally:
                self._leaving.discard(name)

    async def _identical(self, request: OnboardRequest) -> JobRecord | None:
        """Returns the job of an identical request; refuses other content of the same name."""
        if request.name in self._leaving:
            raise Conflict(f"The model {request.name!r} is being deleted; try again afterwards.")
        record = self._models.get(request.name)
        if record is None or record.state is ModelState.FAILED:
            return None
        if record.request != request.to_json():
            raise Conflict(
                f"The model {request.name!r} exists with another source or other options. "
                "Delete it first, or choose another name.",
                param="name",
            )
        jobs = await asyncio.to_thread(self._registry.jobs, model=request.name)
        return self._jobs.get(jobs[0].id, jobs[0])

    def _check_admissible(self, request: OnboardRequest, text: TextSide) -> None:
        donor_record = self._models.get(request.donor or "")
        if donor_record is not None and donor_record.state is ModelState.ONBOARDING:
            return  # its turn comes first; the job checks it then
        donor = self._admission.choose_donor(request, text.config)
        waiting_donor = request.donor == AUTO_DONOR and self._finished
        snapshot = self._admission.snapshot()
        if donor is None and not waiting_donor and snapshot is not None:
            check_capacity(text.checkpoint_bytes, snapshot.device_free_bytes)

    async def _enqueue(self, request: OnboardRequest, *, job: JobRecord | None = None) -> JobRecord:
        """Queues a new job, or an interrupted one again."""
        now = time.time()
        stored = self._models.get(request.name)
        position = (
            stored.position
            if stored is not None
            else await asyncio.to_thread(self._registry.next_position)
        )
        if job is None:
            job = JobRecord(
                id=f"job-{uuid.uuid4().hex}",
                model=request.name,
                request=request.to_json(),
                status=JobStatus.QUEUED,
                created_at=now,
            )
        job = replace(job, request=request.to_json(), status=JobStatus.QUEUED)
        record = ModelRecord(
            name=request.name,
            source=request.source,
            request=request.to_json(),
            state=ModelState.ONBOARDING,
            position=position,
            created_at=now,
        )
        await self._save(record, job)
        self._metrics.add_model(request.name)
        self._finished[job.id] = asyncio.Event()
        self._queue.put_nowait(job.id)
        return job

    # --- jobs ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the jobs, one after the other, until cancelled.

        A job that is cancelled here stays in the registry as it is; the next start finishes it.
        """
        while True:
            job_id = await self._queue.get()
            job = self._jobs[job_id]
            try:
                await self._admit(job)
            except LinkerError as error:
                await self._fail(job_id, error)
            except Exception:
                logger.exception("onboarding %s failed through a fault of ours", job.model)
                await self._fail(job_id, EngineFailure("Onboarding failed; see the server's log."))
            self._finished.pop(job_id).set()

    async def flush(self) -> None:
        """Writes down when models were used, now and then, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self.flush_once()

    async def flush_once(self) -> None:
        """Writes down when models were used since the last time."""
        used = {name: at for name, at in self._catalog.take_used().items() if name in self._models}
        for name, at in used.items():
            self._models[name] = replace(self._models[name], last_used_at=at)
        if used:
            await asyncio.to_thread(self._registry.touch, used)

    async def _admit(self, job: JobRecord) -> None:
        job = replace(job, status=JobStatus.RUNNING)
        await self._save(job)
        await self._restored.wait()  # donors are resident from here on

        def on_stage(stage: JobStage, done_bytes: int, total_bytes: int) -> None:
            self._jobs[job.id] = replace(
                self._jobs[job.id], stage=stage, done_bytes=done_bytes, total_bytes=total_bytes
            )

        request = OnboardRequest.from_json(job.request)
        planned = await self._admission.plan(request, on_stage)
        record = replace(
            self._models[job.model],
            donor=None if planned.donor is None else planned.donor.name,
            family=request.name if planned.donor is None else planned.donor.name,
            fingerprint=planned.fingerprint,
            plan=planned.plan.to_json(),
        )
        on_stage(JobStage.LOADING, 0, planned.plan.unique_bytes)
        await self._save(record, self._jobs[job.id])
        served = await self._admission.load(
            record,
            planned.text,
            planned.plan,
            on_progress=lambda done, total: on_stage(JobStage.LOADING, done, total),
        )
        ready = replace(record, state=ModelState.READY, max_model_len=served.max_model_len)
        await self._save(ready, _succeeded(self._jobs[job.id], planned.plan))
        self._catalog.publish(served)
        logger.info("model %s is ready", job.model)

    async def _fail(self, job_id: str, error: LinkerError) -> None:
        job = self._jobs[job_id]
        logger.warning("onboarding %s failed: %s", job.model, error.message)
        failed = replace(
            job, status=JobStatus.FAILED, error=error.to_record(), finished_at=time.time()
        )
        await self._save(_failed(self._models[job.model], error), failed)

    async def _save(self, *records: ModelRecord | JobRecord) -> None:
        await asyncio.to_thread(self._registry.save, *records)
        for record in records:
            if isinstance(record, ModelRecord):
                self._models[record.name] = record
            else:
                self._jobs[record.id] = record


def _failed(record: ModelRecord, error: LinkerError) -> ModelRecord:
    return replace(record, state=ModelState.FAILED, error=error.to_record())


def _interrupted(job: JobRecord) -> JobRecord:
    error = EngineFailure("The server stopped before the job was done.").to_record()
    return replace(job, status=JobStatus.FAILED, error=error, finished_at=time.time())


def _succeeded(job: JobRecord, plan: SharePlan) -> JobRecord:
    result = {
        "id": job.model,
        "fingerprint": plan.variant_fingerprint,
        "bytes": {
            "logical": plan.logical_bytes,
            "unique": plan.unique_bytes,
            "shared": plan.shared_bytes,
            "checkpoint": plan.checkpoint_bytes,
        },
    }
    return replace(
        job,
        status=JobStatus.SUCCEEDED,
        done_bytes=job.total_bytes,
        result=result,
        finished_at=time.time(),
    )
