"""Jobs that give ready models another plan, until they wait for their turn. Event loop only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linker_core.errors import ConflictError
from server.onboarding.job_rows import JobRows
from server.onboarding.jobs import JobRunner
from server.onboarding.live_job import LiveJob
from server.onboarding.replans import Replans
from server.onboarding.replays import Once
from server.onboarding.request import OnboardRequest
from server.onboarding.roster import Roster
from server.registry.records import JobRecord
from server.settings import SharingSettings


class ReplanJobs:
    """Queues other plans.

    Args:
        roster: The known models and jobs.
        rows: The rows of the jobs.
        replans: Knows what can be asked.
        jobs: Runs them.
    """

    def __init__(self, *, roster: Roster, rows: JobRows, replans: Replans, jobs: JobRunner) -> None:
        self._roster = roster
        self._rows = rows
        self._replans = replans
        self._jobs = jobs

    def check(
        self, name: str, said: Mapping[str, Any], defaults: SharingSettings
    ) -> OnboardRequest:
        """Returns what `queue` would do.

        Raises:
            LinkerError: See `Replans.asked`; or another re-plan of it is under way.
        """
        request = self._replans.asked(name, said, defaults)
        running = self._jobs.replanning(name)
        if running is not None and self._roster.live_job(running).request != request.to_json():
            raise ConflictError(f"The model {name!r} is being planned anew; try again then.")
        return request

    async def queue(
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
            LinkerError: See `check`.
        """
        request = self.check(name, said, defaults)
        if (running := self._jobs.replanning(name)) is not None:
            return self._roster.live_job(running)
        if request.to_json() == self._roster.model(name).request:
            return await self._roster.newest_job(name)
        job = await self._rows.queue_replan(request, once=once)
        self._jobs.take(LiveJob(id=job.id, model=name, replans=True))
        return job
