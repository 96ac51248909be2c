"""The door to onboarding, and how its parts hang together.

The event loop owns all state here.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.metrics.admission import AdmissionMetrics
from server.onboarding.acceptance import Acceptance
from server.onboarding.admission import Admission
from server.onboarding.arrivals import Arrivals
from server.onboarding.changing import Changing
from server.onboarding.departures import Departures
from server.onboarding.donors import Donors
from server.onboarding.dry_runs import DryRuns
from server.onboarding.job_ends import JobEnds
from server.onboarding.job_rows import JobRows
from server.onboarding.jobs import JobRunner
from server.onboarding.last_use import LastUse
from server.onboarding.prospects import Prospects
from server.onboarding.queue_limit import QueueLimit
from server.onboarding.replan_jobs import ReplanJobs
from server.onboarding.replans import Replans
from server.onboarding.request import OnboardRequest
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.onboarding.startup import Startup
from server.onboarding.sweeping import Sweeping
from server.onboarding.twins import Twins
from server.residency.catalog import Catalog
from server.residency.evictions import Evictions


class Onboarder:
    """The door to onboarding: requests, changes, dry runs, the start, deletion.

    Args:
        roster: The known models and jobs.
        catalog: Filled with what is resident.
        admission: Loads what was planned.
        restorer: Says when donors are resident.
        evictions: Takes models off the device.
        twins: Leave with their models; has who decides what is stored.
        metrics: Told how admissions end and what they spent.
        queue_limit: Jobs and dry runs, waiting or running.

    Attributes:
        submit: See `Acceptance.submit`.
        change: See `Changing.change`.
        rehearse: See `DryRuns.rehearse`.
        fit: See `DryRuns.fit`.
        wait: See `JobRunner.wait`.
        cancel: See `JobRunner.cancel`.
        unload: See `Departures.unload`.
        startup_failures: See `Startup.failures`.
        flush: See `LastUse.flush`.
        flush_once: See `LastUse.flush_once`.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        admission: Admission,
        restorer: Restorer,
        evictions: Evictions,
        twins: Twins,
        metrics: AdmissionMetrics,
        queue_limit: int,
    ) -> None:
        sources, bases = restorer.returning.sources, restorer.returning.bases
        planner = twins.planner
        rows = JobRows(roster)
        donors = Donors(catalog=catalog, comparisons=planner.comparisons)
        replans = Replans(
            roster=roster, catalog=catalog, planner=planner, admission=admission, restorer=restorer
        )
        sweeping = Sweeping(
            roster=roster, planner=planner, deltas=admission.deltas, bases=bases, sources=sources
        )
        ends = JobEnds(
            roster=roster, rows=rows, admission=admission, restorer=restorer, metrics=metrics
        )
        arrivals = Arrivals(
            roster=roster,
            catalog=catalog,
            donors=donors,
            planner=planner,
            admission=admission,
            restorer=restorer,
            metrics=metrics,
        )
        jobs = JobRunner(
            roster=roster,
            rows=rows,
            ends=ends,
            sweeping=sweeping,
            restorer=restorer,
            arrivals=arrivals,
            replans=replans,
        )
        limit = QueueLimit(jobs=jobs, limit=queue_limit)
        prospects = Prospects(roster=roster, catalog=catalog, jobs=jobs, restorer=restorer)
        departures = Departures(
            roster=roster,
            catalog=catalog,
            admission=admission,
            bases=bases,
            evictions=evictions,
            twins=twins,
            is_replanning=lambda name: jobs.replanning(name) is not None,
        )
        startup = Startup(
            roster=roster,
            rows=rows,
            catalog=catalog,
            jobs=jobs,
            planner=planner,
            restorer=restorer,
            sources=sources,
        )
        acceptance = Acceptance(
            roster=roster,
            sources=sources,
            departures=departures,
            admission=admission,
            donors=donors,
            prospects=prospects,
            jobs=jobs,
            limit=limit,
        )
        changing = Changing(
            roster=roster,
            departures=departures,
            jobs=jobs,
            replan_jobs=ReplanJobs(roster=roster, rows=rows, replans=replans, jobs=jobs),
            limit=limit,
        )
        dry_runs = DryRuns(
            planner=planner,
            admission=admission,
            restorer=restorer,
            donors=donors,
            prospects=prospects,
            limit=limit,
        )
        last_use = LastUse(catalog=catalog, writes=roster.writes)
        restorer.returning.on_changed = startup.plan_anew
        sources.on_arrived = jobs.catch_up_soon
        self._admission = admission
        self._departures = departures
        self._jobs = jobs
        self._limit = limit
        self._restorer = restorer
        self._sources = sources
        self._startup = startup
        self._sweeping = sweeping
        self.submit = acceptance.submit
        self.change = changing.change
        self.rehearse = dry_runs.rehearse
        self.fit = dry_runs.fit
        self.wait = jobs.wait
        self.cancel = jobs.cancel
        self.unload = departures.unload
        self.startup_failures = startup.failures
        self.flush = last_use.flush
        self.flush_once = last_use.flush_once

    async def open(self, startup: Sequence[OnboardRequest]) -> None:
        """Reads the registry and queues what is to be done; see `Startup.open`."""
        await self._startup.open(startup)
        await self._admission.deltas.clear_unfinished()
        await self._sweeping.sweep()

    async def run(self) -> None:
        """Runs the jobs until cancelled; see `JobRunner.run`."""
        try:
            await self._jobs.run()
        finally:
            await self._sources.close()

    async def delete(self, name: str, *, rehome: bool = False) -> None:
        """Deletes a model and what it alone needs; see `Departures.delete`."""
        await self._departures.delete(name, rehome=rehome)
        await self._sweeping.sweep()
