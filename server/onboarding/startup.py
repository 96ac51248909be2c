"""What a start takes up: the models asked for, the stored ones, and what the last stop broke off.

Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from server.onboarding.jobs import JobRunner
from server.onboarding.outcomes import interrupted_job
from server.onboarding.planner import Planner
from server.onboarding.request import OnboardRequest
from server.onboarding.roster import Roster
from server.registry.records import ModelRecord, ModelState
from server.residency.catalog import Catalog


class Startup:
    """The models of the start.

    Args:
        roster: The known models and jobs.
        catalog: The resident models.
        jobs: Takes what is to be onboarded.
        planner: Knows which prices still hold.
        names: Guards checks of names and donors together with the changes that follow from them.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        jobs: JobRunner,
        planner: Planner,
        names: asyncio.Lock,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._jobs = jobs
        self._planner = planner
        self._names = names
        self._requested: dict[str, OnboardRequest] = {}
        self._names_at_start: frozenset[str] = frozenset()

    async def open(self, startup: Sequence[OnboardRequest]) -> None:
        """Reads the registry and queues what is to be done, before the engine runs.

        A start-up model whose stored row was made from the same request keeps its plan; another
        row of that name is replaced, and the variants of a replaced donor are planned anew. So is
        whatever was priced at another precision than is served now, or with its deltas rounded
        otherwise.
        """
        interrupted = await self._roster.open()
        self._requested = {request.name: request for request in startup}
        stored, requests = self._roster.models(), dict(self._requested)
        again = {name for name, request in requests.items() if not self._is_stored(request)}
        again |= {r.name for r in stored if r.donor in again and r.name not in requests}
        again |= {r.name for r in stored if r.state is ModelState.ONBOARDING}
        again |= {r.name for r in stored if self._is_priced_otherwise(r)}
        for record in stored:
            if record.name in again and record.name not in requests:
                requests[record.name] = OnboardRequest.from_json(record.request)
        newest = {job.model: job for job in reversed(interrupted) if job.model in again}
        for job in interrupted:
            if newest.get(job.model) is not job:
                await self._roster.save(interrupted_job(job))
        for name in (name for name in requests if name in again):
            await self._jobs.enqueue(requests[name], job=newest.get(name))
        # A model that was being onboarded when the server stopped is taken up again; it was not
        # served before, so nobody waits for it now.
        resumed = {
            record.name
            for record in stored
            if record.state is ModelState.ONBOARDING and record.name not in self._requested
        }
        self._names_at_start = frozenset(
            record.name
            for record in self._roster.models()
            if record.state is not ModelState.FAILED and record.name not in resumed
        )

    def failures(self) -> list[str] | None:
        """Returns the start-up models that failed; None while some are still on their way."""
        failed = []
        for record in self._roster.models():
            if record.name not in self._names_at_start:
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

    def _is_priced_otherwise(self, record: ModelRecord) -> bool:
        return record.state is ModelState.READY and not self._planner.price_holds(record.plan)

    async def plan_anew(self, record: ModelRecord) -> bool:
        """Queues a start-up model whose files changed, and the variants of such a donor."""
        if record.name not in self._requested:
            return False
        async with self._names:
            names = [record.name, *self._roster.dependants(record.name)]
            for model in [found for name in names if (found := self._roster.find(name))]:
                if model.state is ModelState.READY:
                    request = self._requested.get(model.name)
                    await self._jobs.enqueue(request or OnboardRequest.from_json(model.request))
        return True
