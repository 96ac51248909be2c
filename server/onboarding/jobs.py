"""The queue of onboarding jobs: one at a time has its turn, and each can be cancelled.

The event loop owns all state here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from linker_core.errors import ConflictError, EngineFailureError
from server.onboarding.arrivals import Arrivals
from server.onboarding.background import Background
from server.onboarding.job_ends import JobEnds
from server.onboarding.job_rows import JobRows
from server.onboarding.live_job import Checked, LiveJob
from server.onboarding.preparations import Preparations
from server.onboarding.replans import Replans
from server.onboarding.replays import Once
from server.onboarding.request import OnboardRequest
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.onboarding.sweeping import Sweeping
from server.registry.records import JobRecord, JobStatus

_ENDED = {
    JobStatus.SUCCEEDED: "it has succeeded",
    JobStatus.FAILED: "it has failed",
    JobStatus.CANCELLED: "it was cancelled",
}


class JobRunner:
    """The jobs that wait and the one that runs.

    Args:
        roster: The known models and jobs.
        rows: The rows of the jobs.
        ends: Ends what has not succeeded.
        sweeping: Clears up after each.
        restorer: Brings back what had no room.
        arrivals: Onboards.
        replans: Plans anew.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        rows: JobRows,
        ends: JobEnds,
        sweeping: Sweeping,
        restorer: Restorer,
        arrivals: Arrivals,
        replans: Replans,
    ) -> None:
        self._roster = roster
        self._rows = rows
        self._ends = ends
        self._sweeping = sweeping
        self._restorer = restorer
        self._arrivals = arrivals
        self._replans = replans
        self._background = Background()
        self._preparations = Preparations(
            rows=rows,
            sources=restorer.returning.sources,
            background=self._background,
            queue=self._wait_for_turn,
            conclude=self._conclude,
        )
        self._live: dict[str, LiveJob] = {}  # by id
        self._queue: asyncio.Queue[LiveJob | None] = asyncio.Queue()  # None: room may be free

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

        See `JobRows.queue` for the arguments, and `Preparations.begin` for what comes before.
        """
        queued = await self._rows.queue(request, job=job, options=options, once=once)
        live = self._live[queued.id] = LiveJob(id=queued.id, model=request.name, checked=checked)
        self._preparations.begin(live, request)
        return queued

    def take(self, live: LiveJob) -> None:
        """Lets a stored job wait for its turn."""
        self._live[live.id] = live
        self._wait_for_turn(live)

    def replanning(self, name: str) -> str | None:
        """Returns the job that gives a ready model another plan, or None."""
        for live in self._live.values():
            if live.replans and live.model == name and self._roster.is_open(live.id):
                return live.id
        return None

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
            JobNotFoundError: There is no such job.
            ConflictError: It has ended, or models that were ready before wait for its model.
            NotReadyError: The registry cannot be written; the job goes on.
            EngineFailureError: It could not be ended, through a fault of ours.
        """
        live = self._live.get(job_id)
        if live is not None:
            await self._stop(live)
        job = await self._roster.known_job(job_id)
        if live is not None and self._roster.is_open(job_id):
            raise EngineFailureError("The job could not be ended; see the server's log.")
        if live is None or job.status is not JobStatus.CANCELLED:
            raise ConflictError(f"The job has ended already: {_ENDED[job.status]}.")
        return job

    async def run(self) -> None:
        """Runs the jobs until cancelled.

        A job that is cancelled here stays in the registry as it is; the next start finishes it.
        """
        try:
            while True:
                live = await self._queue.get()
                if live is not None and live.id in self._live and not live.unwanted:
                    error = await live.until_done(self._do(live))
                    await self._conclude(live, error)
                await self._restorer.catch_up()
                if live is None:
                    await self._sweeping.sweep()  # a dry run may have left something
        finally:
            await self._background.close()

    def _wait_for_turn(self, live: LiveJob) -> None:
        self._queue.put_nowait(live)

    async def _stop(self, live: LiveJob) -> None:
        """Has a job end, and waits for that."""
        async with self._roster.names:
            if not live.unwanted and self._roster.is_open(live.id):
                if not live.replans:
                    self._ends.check_unneeded(live.model)
                live.unwanted = await self._rows.mark_unwanted(live.id)
                if live.unwanted and live.work is not None:
                    live.work.cancel()
                elif live.unwanted:
                    live.work = self._background.begin(self._conclude(live, None))
        await live.ended.wait()

    async def _do(self, live: LiveJob) -> None:
        job = await self._rows.begin(live)
        on_stage = self._rows.on_stage(live)
        if live.replans:
            await self._replans.run(live.id, on_stage=on_stage)
        else:
            await self._arrivals.run(job, live.checked, on_stage=on_stage)

    async def _conclude(self, live: LiveJob, error: BaseException | None) -> None:
        """Ends a job whose work has stopped, and lets those who wait for it go on."""
        try:
            await self._ends.end(live, error)
            await self._sweeping.sweep()
        finally:
            del self._live[live.id]
            live.ended.set()
