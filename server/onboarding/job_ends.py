"""How jobs end: what rows, engine and metrics are told. Event loop only."""

from __future__ import annotations

import logging
from dataclasses import replace

from linker_core.errors import ConflictError, EngineFailureError, LinkerError
from server.metrics.admission import AdmissionMetrics
from server.onboarding.admission import Admission
from server.onboarding.job_log import say_cancelled, say_failed, say_succeeded
from server.onboarding.job_rows import JobRows
from server.onboarding.live_job import LiveJob
from server.onboarding.outcomes import failed_job, failed_model
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.registry.records import JobStage, ModelState

logger = logging.getLogger(__name__)


class JobEnds:
    """Stores how jobs end that have not succeeded, and undoes what they have begun.

    Args:
        roster: The known models and jobs.
        rows: The rows of the jobs.
        admission: Takes a withdrawn model out of the engine.
        restorer: Says whether the engine is whole.
        metrics: Told how admissions end.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        rows: JobRows,
        admission: Admission,
        restorer: Restorer,
        metrics: AdmissionMetrics,
    ) -> None:
        self._roster = roster
        self._rows = rows
        self._admission = admission
        self._restorer = restorer
        self._metrics = metrics

    async def end(self, live: LiveJob, error: BaseException | None) -> None:
        """Ends a job whose work has stopped, unless it has succeeded and said so itself."""
        if not self._roster.is_open(live.id):
            assert error is None
            say_succeeded(live)
        elif live.unwanted:
            await self._withdraw(live)
        elif isinstance(error, LinkerError):
            await self._fail(live, error)
        else:
            logger.error("job %s failed through a fault of ours", live.id, exc_info=error)
            known = EngineFailureError("Onboarding failed; see the server's log.")
            await self._fail(live, known)

    def check_unneeded(self, name: str) -> None:
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

    async def _fail(self, live: LiveJob, error: LinkerError) -> None:
        say_failed(live, error.message)
        job = self._roster.live_job(live.id)
        if live.replans:
            await self._roster.settle(failed_job(job, error))
            return
        # It holds nothing, so its donor may go.
        model = replace(failed_model(self._roster.model(job.model), error), donor=None)
        await self._roster.settle(model, failed_job(job, error))
        self._metrics.failed()

    async def _withdraw(self, live: LiveJob) -> None:
        """Ends a cancelled job whose work has stopped."""
        job = self._roster.live_job(live.id)
        if not live.replans and job.stage is JobStage.LOADING and self._restorer.done.is_set():
            await self._admission.unload(job.model)  # it may have come just before
        async with self._roster.names:
            await self._rows.withdraw(job)
        say_cancelled(live)
        if not live.replans:
            self._metrics.cancelled()
