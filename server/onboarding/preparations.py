"""What jobs do before they wait for their turn: download their source, wait for their donor's job.

Event loop only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from server.onboarding.background import Background
from server.onboarding.hub.source import is_hub_source
from server.onboarding.job_rows import JobRows
from server.onboarding.live_job import LiveJob
from server.onboarding.request import OnboardRequest
from server.onboarding.sources import Sources
from server.registry.records import JobStage

Conclude = Callable[[LiveJob, BaseException | None], Awaitable[None]]


class Preparations:
    """The jobs that are not ready to wait for their turn; several at once.

    Args:
        rows: The rows of the jobs.
        sources: Downloads.
        background: Has the tasks.
        queue: Told of a job that is ready to wait for its turn.
        conclude: Ends one that was cancelled, or whose preparation failed, and why.
    """

    def __init__(
        self,
        *,
        rows: JobRows,
        sources: Sources,
        background: Background,
        queue: Callable[[LiveJob], None],
        conclude: Conclude,
    ) -> None:
        self._rows = rows
        self._sources = sources
        self._background = background
        self._queue = queue
        self._conclude = conclude
        self._jobs: dict[str, LiveJob] = {}  # by model

    def begin(self, live: LiveJob, request: OnboardRequest) -> None:
        """Prepares a job if there is something to prepare, and has it wait for its turn then.

        What is on the hub is downloaded, and whoever names a donor that is being downloaded waits
        for the donor's job.
        """
        donor = self._jobs.get(request.donor or "")
        if is_hub_source(request.source) or donor is not None:
            self._jobs[live.model] = live
            self._background.begin(self._prepare(live, request, donor))
        else:
            self._queue(live)

    async def _prepare(self, live: LiveJob, request: OnboardRequest, donor: LiveJob | None) -> None:
        error = await live.until_done(self._fetch(live, request, donor))
        if self._jobs.get(live.model) is live:
            del self._jobs[live.model]
        if live.unwanted or error is not None:
            await self._conclude(live, error)
        else:
            live.work = None
            self._queue(live)

    async def _fetch(self, live: LiveJob, request: OnboardRequest, donor: LiveJob | None) -> None:
        if is_hub_source(request.source):
            await self._rows.begin(live)
            on_stage = self._rows.on_stage(live)
            await self._sources.path(
                request.source,
                on_progress=lambda done, total: on_stage(JobStage.VALIDATING, done, total),
            )
        if donor is not None:
            await donor.ended.wait()
