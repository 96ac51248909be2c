"""Takes onboarding requests: what can be checked is checked at once, the rest is queued.

The event loop owns all state here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from linker_core.errors import ConflictError, InvalidRequestError, NotReadyError, QueueFullError
from linker_core.sharing.plan import Policy
from linker_core.weights.architecture import ModelConfig
from server.metrics.admission import AdmissionMetrics
from server.onboarding.adapters import Source
from server.onboarding.admission import Admission
from server.onboarding.arrivals import Arrivals
from server.onboarding.departures import Departures
from server.onboarding.donor_choice import DonorChoice
from server.onboarding.donors import Donors
from server.onboarding.fitting import FitRequest, Fitting, JointPlan
from server.onboarding.job_ends import JobEnds
from server.onboarding.job_rows import JobRows
from server.onboarding.jobs import JobRunner
from server.onboarding.live_job import Checked
from server.onboarding.options import Options
from server.onboarding.planner import OnStage, Planner, as_progress
from server.onboarding.prepare import read_source
from server.onboarding.rehearsal import DryRun, Rehearsal
from server.onboarding.replan_jobs import ReplanJobs
from server.onboarding.replans import Replans
from server.onboarding.replays import Once
from server.onboarding.request import (
    AUTO_DONOR,
    OnboardRequest,
    check_name,
    check_sharing,
    own_plan_request,
)
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.onboarding.sources import Found
from server.onboarding.startup import Startup
from server.onboarding.sweeping import Sweeping
from server.onboarding.timing import Stopwatch
from server.registry.records import JobRecord, ModelState
from server.residency.catalog import Catalog
from server.residency.evictions import Evictions
from server.settings import SharingSettings

logger = logging.getLogger(__name__)

_FLUSH_S = 5.0


class Onboarder:
    """The door to onboarding: requests, dry runs, the start, deletion.

    Args:
        roster: The known models and jobs.
        catalog: Filled with what is resident.
        planner: Decides what is stored.
        admission: Loads what was planned.
        restorer: Says when donors are resident.
        evictions: Takes models off the device.
        metrics: Told how admissions end and what they spent.
        queue_limit: Jobs and dry runs, waiting or running.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        planner: Planner,
        admission: Admission,
        restorer: Restorer,
        evictions: Evictions,
        metrics: AdmissionMetrics,
        queue_limit: int,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._admission = admission
        self._restorer = restorer
        self._sources = restorer.returning.sources
        self._options = Options(roster)
        self._queue_limit = queue_limit
        self._donors = Donors(catalog=catalog, comparisons=planner.comparisons)
        rows = JobRows(roster)
        replans = Replans(
            roster=roster,
            catalog=catalog,
            planner=planner,
            admission=admission,
            restorer=restorer,
        )
        self._sweeping = Sweeping(
            roster=roster,
            planner=planner,
            deltas=admission.deltas,
            bases=restorer.returning.bases,
            sources=self._sources,
        )
        self._jobs = JobRunner(
            roster=roster,
            rows=rows,
            ends=JobEnds(
                roster=roster,
                rows=rows,
                admission=admission,
                restorer=restorer,
                metrics=metrics,
            ),
            sweeping=self._sweeping,
            restorer=restorer,
            arrivals=Arrivals(
                roster=roster,
                catalog=catalog,
                donors=self._donors,
                planner=planner,
                admission=admission,
                restorer=restorer,
                metrics=metrics,
            ),
            replans=replans,
        )
        self._replans = ReplanJobs(roster=roster, rows=rows, replans=replans, jobs=self._jobs)
        self._rehearsal = Rehearsal(
            choose=self._choose_donor_now, planner=planner, admission=admission
        )
        self._fitting = Fitting(choose=self._choose_donor_now, planner=planner)
        self._num_rehearsing = 0
        self._departures = Departures(
            roster=roster,
            catalog=catalog,
            admission=admission,
            bases=restorer.returning.bases,
            evictions=evictions,
            is_replanning=lambda name: self._jobs.replanning(name) is not None,
        )
        self._startup = Startup(
            roster=roster,
            rows=rows,
            catalog=catalog,
            jobs=self._jobs,
            planner=planner,
            restorer=restorer,
            sources=self._sources,
        )
        restorer.returning.on_changed = self._startup.plan_anew
        self._sources.on_arrived = self._jobs.catch_up_soon

    async def open(self, startup: Sequence[OnboardRequest]) -> None:
        """Reads the registry and queues what is to be done; see `Startup.open`."""
        await self._startup.open(startup)
        await self._admission.deltas.clear_unfinished()
        await self._sweeping.sweep()

    def startup_failures(self) -> list[str] | None:
        """Returns the start-up models that failed; None while some are still on their way."""
        return self._startup.failures()

    # --- requests -----------------------------------------------------------------------------

    async def submit(
        self,
        request: OnboardRequest,
        *,
        said: Mapping[str, Any] = MappingProxyType({}),
        options: Mapping[str, Any] = MappingProxyType({}),
        once: Once | None = None,
    ) -> JobRecord:
        """Checks what can be checked at once and queues the rest.

        Args:
            request: What to onboard.
            said: Policy and options that were asked for; the request's others are defaults.
            options: See `Options.set`. They are no part of the request: one that is
                otherwise the same sets them.
            once: The idempotency key that the job answers from now on.

        Returns:
            The job; of an identical request that is under way or done, the same one.

        Raises:
            LinkerError: Name, source, checkpoint, donor or capacity rule the model out, the name
                is taken by other content, or too many jobs wait.
        """
        check_name(request.name)
        check_sharing(request)
        found = await self._sources.find(request.source)
        with self._sources.held(found.source):  # until a row speaks of it
            request = _resolved(request, found, said)
            return await self._queue(request, found.path, options, once)

    async def _queue(
        self,
        request: OnboardRequest,
        path: Path | None,
        options: Mapping[str, Any],
        once: Once | None,
    ) -> JobRecord:
        async with self._roster.names:
            same = await self._check_free(request, options, once)
        if same is not None:
            return same
        checked = source = None
        if path is not None:
            # Nobody else waits for these files, whatever they are.
            begun = time.monotonic()
            source = await asyncio.to_thread(read_source, path)
            checked = Checked(identity=source.identity, seconds=time.monotonic() - begun)
        async with self._roster.names:
            same = await self._check_free(request, options, once)
            if same is not None:
                return same
            if source is not None:
                self._check_admissible(request, source)
            return await self._jobs.enqueue(request, checked=checked, options=options, once=once)

    async def change(
        self,
        name: str,
        *,
        options: Mapping[str, Any],
        said: Mapping[str, Any],
        defaults: SharingSettings,
        once: Once | None = None,
    ) -> JobRecord | None:
        """Changes what an operator wants of a model; queues another plan of a resident variant.

        Args:
            name: The model, or its alias.
            options: See `Options.set`.
            said: Policy and options of another plan; with none of them the plan stays.
            defaults: What they leave open.
            once: The idempotency key that the job answers from now on.

        Returns:
            The job of the plan; None if the plan stays.

        Raises:
            LinkerError: The model or the options rule it out, or too many jobs wait.
        """
        async with self._roster.names:
            name = self._roster.named(name).name
            self._departures.check_gone(name)
            replans = not options or any(value is not None for value in said.values())
            if replans:
                self._replans.check(name, said, defaults)
                if self._jobs.replanning(name) is None:
                    self._check_queue()
            await self._options.set(name, options)
            return await self._replans.queue(name, said, defaults, once=once) if replans else None

    async def rehearse(
        self, request: OnboardRequest, *, said: Mapping[str, Any] = MappingProxyType({})
    ) -> DryRun:
        """Answers what onboarding would do; loads and keeps nothing but scans and prices.

        Cancelling it ends what it has started. The arguments are those of `submit`.

        Raises:
            LinkerError: Source, checkpoint, donor or options rule the model out, or too many wait.
        """
        if request.name:
            check_name(request.name)
        check_sharing(request)
        found = await self._sources.find(request.source)
        request = _resolved(request, found, said)
        with self._rehearsing(request.donor), self._sources.held(found.source):
            path = await self._sources.path(found.source, on_progress=_ignore_progress)
            return await self._rehearsal.run(request, path)

    async def fit(self, request: FitRequest) -> JointPlan:
        """Chooses plans of several variants that fit together; loads and keeps as a dry run does.

        Raises:
            LinkerError: A source, a checkpoint or the donor rule it out, or too many wait.
        """
        found = [(await self._sources.find(source)).source for source in request.sources.values()]
        with self._rehearsing(request.donor), ExitStack() as held:
            for source in found:
                held.enter_context(self._sources.held(source))
            paths = [
                await self._sources.path(source, on_progress=_ignore_progress) for source in found
            ]
            return await self._fitting.run(request, paths)

    @contextmanager
    def _rehearsing(self, donor: str | None) -> Iterator[None]:
        """Counts a dry run among what waits and runs.

        Raises:
            NotReadyError: Models to share with are on their way.
            QueueFullError: Too many wait.
        """
        if self._is_coming(donor) or not self._restorer.done.is_set():
            raise NotReadyError("The models to share with are still on their way; try again.")
        self._check_queue()
        self._num_rehearsing += 1
        try:
            yield
        finally:
            self._num_rehearsing -= 1
            self._jobs.catch_up_soon()  # its tuner may have been in the way of a model

    async def _check_free(
        self, request: OnboardRequest, options: Mapping[str, Any], once: Once | None
    ) -> JobRecord | None:
        """Returns the job of an identical request; refuses a taken name and a full queue."""
        same = await self._identical(request)
        if same is None:
            self._check_queue()
            return None
        await self._options.set(request.name, options)
        if once is not None:
            await self._roster.save(once.used_for(same.id))
        return same

    def _check_queue(self) -> None:
        if self._jobs.num_live + self._num_rehearsing >= self._queue_limit:
            raise QueueFullError("Too many models are being onboarded; try again later.")

    async def _identical(self, request: OnboardRequest) -> JobRecord | None:
        """Returns the job of an identical request; refuses other content of the same name."""
        self._departures.check_gone(request.name)
        self._options.check_no_alias(request.name)
        record = self._roster.find(request.name)
        if record is None or record.state is ModelState.FAILED:
            return None
        if record.request != request.to_json():
            raise ConflictError(
                f"The model {request.name!r} exists with another source or other options. "
                "Delete it first, or choose another name.",
                param="name",
            )
        return await self._roster.newest_job(request.name)

    def _check_admissible(self, request: OnboardRequest, source: Source) -> None:
        named = None if request.donor is None else self._roster.find(request.donor)
        unloaded = named is not None and named.state is ModelState.UNLOADED
        if unloaded or self._is_coming(request.donor):
            return  # the job checks it then
        try:
            donor = self._donors.likely(request, source)
        except (ConflictError, InvalidRequestError):
            if not self._may_find_donor(request):
                raise
            return  # that of a delta, or an adapter's base, may be among those
        if donor is None and self._may_find_donor(request):
            return
        self._admission.room.check(
            self._admission.least_bytes(request, source, donor),
            what=f"The model {request.name!r}",
            keep=frozenset() if donor is None else frozenset({donor.name}),
        )

    async def _choose_donor_now(
        self,
        request: OnboardRequest,
        source: Source | ModelConfig,
        watch: Stopwatch,
        on_stage: OnStage,
    ) -> DonorChoice:
        """Returns the donor of a dry run.

        Raises:
            NotReadyError: It may be one that is still on its way.
            LinkerError: See `Donors.settle`.
        """
        if not self._is_coming(request.donor):
            await self._restorer.returning.recall_donors()
            choice = await self._donors.settle(
                request, source, watch=watch, on_progress=as_progress(on_stage)
            )
            if choice.donor is not None or not self._may_find_donor(request):
                return choice
        raise NotReadyError("The models to share with are still on their way; try again.")

    def _is_coming(self, donor: str | None) -> bool:
        """Whether a donor is known and on its way, or on its way back."""
        record = None if donor is None else self._roster.find(donor)
        return (
            record is not None
            and record.state in (ModelState.ONBOARDING, ModelState.READY)
            and self._catalog.get(record.name) is None
        )

    def _may_find_donor(self, request: OnboardRequest) -> bool:
        """Whether a model without a donor so far may yet get one."""
        waiting = self._jobs.num_live > 0 or not self._restorer.done.is_set()
        return request.donor == AUTO_DONOR and waiting

    # --- what goes on ------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the jobs until cancelled; see `JobRunner.run`."""
        try:
            await self._jobs.run()
        finally:
            await self._sources.close()

    async def wait(self, job_id: str) -> JobRecord:
        """Waits for the end of a job."""
        return await self._jobs.wait(job_id)

    async def cancel(self, job_id: str) -> JobRecord:
        """Ends a job and undoes what it has begun; see `JobRunner.cancel`."""
        return await self._jobs.cancel(job_id)

    async def unload(self, name: str, *, rehome: bool = False) -> None:
        """Takes a model off the device until somebody asks for it; see `Departures.unload`."""
        await self._departures.unload(name, rehome=rehome)

    async def delete(self, name: str, *, rehome: bool = False) -> None:
        """Deletes a model; see `Departures.delete`."""
        await self._departures.delete(name, rehome=rehome)
        await self._sweeping.sweep()

    async def flush(self) -> None:
        """Writes down when models were used, now and then, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self.flush_once()

    async def flush_once(self) -> None:
        """Writes down what is not stored yet; what cannot be written now is kept."""
        used_at = self._catalog.take_used()
        try:
            await self._roster.writes.note_use(used_at)
            await self._roster.writes.write_later()
        except NotReadyError as error:
            logger.warning("the registry cannot be written: %s", error.message)
            self._catalog.give_back(used_at)


def _resolved(request: OnboardRequest, found: Found, said: Mapping[str, Any]) -> OnboardRequest:
    """Returns a request with what its source means, and without a policy where that has a plan."""
    request = replace(request, source=found.source)
    if found.kind == "checkpoint":
        return request
    return own_plan_request(request, said, Policy(found.kind))


def _ignore_progress(_done_bytes: int, _total_bytes: int) -> None:
    """Nobody follows the download of a dry run."""
