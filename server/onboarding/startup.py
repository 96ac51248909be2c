"""What a start takes up: the models asked for, the stored ones, and what the last stop broke off.

Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from linker_core.errors import LinkerError
from server.onboarding.hub.source import is_hub_source
from server.onboarding.job_rows import JobRows
from server.onboarding.jobs import JobRunner
from server.onboarding.outcomes import interrupted_job
from server.onboarding.planner import Planner
from server.onboarding.request import OnboardRequest
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.onboarding.sources import Sources
from server.registry.records import SERVABLE, ModelRecord, ModelState
from server.residency.catalog import Catalog

logger = logging.getLogger(__name__)


class Startup:
    """The models of the start.

    Args:
        roster: The known models and jobs.
        rows: The rows of the jobs.
        catalog: The resident models.
        jobs: Takes what is to be onboarded.
        planner: Knows which prices still hold.
        restorer: Told what has to be there after the start.
        sources: Knows which commits revisions on the hub are.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        rows: JobRows,
        catalog: Catalog,
        jobs: JobRunner,
        planner: Planner,
        restorer: Restorer,
        sources: Sources,
    ) -> None:
        self._roster = roster
        self._rows = rows
        self._catalog = catalog
        self._jobs = jobs
        self._planner = planner
        self._restorer = restorer
        self._sources = sources
        self._requested: dict[str, OnboardRequest] = {}
        self._names_at_start: frozenset[str] = frozenset()

    async def open(self, startup: Sequence[OnboardRequest]) -> None:
        """Reads the registry and queues what is to be done, before the engine runs.

        A start-up model whose stored row was made from the same request keeps its plan; another
        row of that name is replaced, and the variants of a replaced donor are planned anew. So is
        whatever was priced at another precision than is served now, or with its deltas rounded
        otherwise.
        """
        interrupted = await self._rows.without_cancelled(await self._roster.open())
        pinned = await asyncio.gather(*map(self._pinned, startup))
        self._requested = {request.name: request for request in pinned}
        self._restorer.at_start = frozenset(self._requested)
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
            if record.name not in resumed and self._is_to_come(record)
        )

    def failures(self) -> list[str] | None:
        """Returns the start-up models that failed; None while some are still on their way."""
        if not self._restorer.done.is_set():
            return None
        failed = []
        for record in self._roster.models():
            if record.name not in self._names_at_start:
                continue
            if record.state is ModelState.FAILED or record.error is not None:
                failed.append(record.name)
            elif record.state is not ModelState.UNLOADED and not self._is_there(record):
                return None
        return failed

    async def _pinned(self, request: OnboardRequest) -> OnboardRequest:
        """Returns a request that names the commit of a source on the hub.

        A branch that led to the stored model stays where it was, so that a start changes no model
        and needs no hub. Where a commit cannot be found out, the model's job will say why.
        """
        if not is_hub_source(request.source):
            return request
        kept = await self._sources.kept(request.source)
        stored = self._roster.find(request.name)
        if stored is not None and stored.request["source"] in kept:
            return replace(request, source=stored.request["source"])
        try:
            found = await self._sources.find(request.source)
        except LinkerError as error:
            logger.warning("start-up model %s: %s", request.name, error.message)
            return request
        return replace(request, source=found.source)

    def _is_there(self, record: ModelRecord) -> bool:
        """Whether a model is resident, and stored as that: until then it cannot be unloaded."""
        stored = record.state is not ModelState.ONBOARDING
        return stored and self._catalog.get(record.name) is not None

    def _is_to_come(self, record: ModelRecord) -> bool:
        """Whether a start waits for a model; of those that are not resident for few."""
        if record.state is ModelState.UNLOADED:
            return record.pinned or record.name in self._requested
        return record.state is not ModelState.FAILED

    def _is_stored(self, request: OnboardRequest) -> bool:
        stored = self._roster.find(request.name)
        return (
            stored is not None and stored.state in SERVABLE and stored.request == request.to_json()
        )

    def _is_priced_otherwise(self, record: ModelRecord) -> bool:
        """Whether a price was measured otherwise; a donor's that was a variant stays as it was."""
        priced = record.state in SERVABLE and record.donor is not None
        return priced and not self._planner.price_holds(record.plan)

    async def plan_anew(self, record: ModelRecord) -> bool:
        """Queues a start-up model whose files changed, and the variants of such a donor."""
        if record.name not in self._requested:
            return False
        async with self._roster.names:
            names = [record.name, *self._roster.dependants(record.name)]
            for model in [found for name in names if (found := self._roster.find(name))]:
                if model.state in SERVABLE:
                    self._catalog.retract(model.name)  # what it was served as is no more
                    request = self._requested.get(model.name)
                    await self._jobs.enqueue(request or OnboardRequest.from_json(model.request))
        return True
