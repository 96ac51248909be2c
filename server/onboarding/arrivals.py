"""The way of one model from an accepted request to a resident model that is open to requests.

The event loop owns all state here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace

from linker_core.errors import NotReadyError
from server.metrics.admission import AdmissionMetrics
from server.onboarding.adapters import Source
from server.onboarding.admission import Admission, Arrival
from server.onboarding.donors import Donors
from server.onboarding.live_job import Checked
from server.onboarding.outcomes import retimed_job, succeeded_job
from server.onboarding.planner import OnStage, Planned, Planner, as_progress
from server.onboarding.request import OnboardRequest
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.onboarding.timing import Stopwatch
from server.onboarding.unbroken import unbroken
from server.registry.records import JobRecord, JobStage, ModelRecord, ModelState
from server.residency.catalog import Catalog, ServedModel


class Arrivals:
    """Plans, loads and publishes models.

    Args:
        roster: The known models and jobs.
        catalog: Filled with what is resident.
        donors: Chooses the donor.
        planner: Decides what is stored.
        admission: Loads what was planned.
        restorer: Says when donors are resident, and has who brings them back.
        metrics: Told what admissions spent.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        donors: Donors,
        planner: Planner,
        admission: Admission,
        restorer: Restorer,
        metrics: AdmissionMetrics,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._donors = donors
        self._planner = planner
        self._admission = admission
        self._restorer = restorer
        self._sources = restorer.returning.sources
        self._returning = restorer.returning
        self._metrics = metrics

    async def run(self, job: JobRecord, checked: Checked | None, *, on_stage: OnStage) -> None:
        """Does what a job asks for; the model's row and the job's say so in the end.

        Once the model is open to requests nothing breaks this off any more: a wait that is
        cancelled then ends when both are stored.

        Args:
            job: What is asked.
            checked: What was looked at before; None of a job of an earlier life of the server.
            on_stage: Hears of each stage's progress.

        Raises:
            LinkerError: Any reason why the model cannot be onboarded.
        """
        request, watch = OnboardRequest.from_json(job.request), Stopwatch()
        source = await self._open(request, checked, watch)
        # Held until it is loaded: the tuner of a dry run would take the room meanwhile.
        async with self._planner.turn:
            record, planned, arrival = await self._plan_and_load(
                job.id, request, source, watch, on_stage
            )
            watch.add("alias", arrival.alias_seconds)
            watch.add("move", arrival.move_seconds)
            watch.add("ready", arrival.first_token_seconds)
            await unbroken(self._publish(job.id, record, planned, arrival.model, watch))

    async def _plan_and_load(
        self,
        job_id: str,
        request: OnboardRequest,
        source: Source,
        watch: Stopwatch,
        on_stage: OnStage,
    ) -> tuple[ModelRecord, Planned, Arrival]:
        record = await self._choose_donor(request, source, watch, on_stage)
        async with self._returning.leaning(request.name) as donor:
            planned = await self._planner.plan(
                request, source, donor, watch=watch, on_stage=on_stage
            )
            record = replace(record, fingerprint=planned.fingerprint, plan=planned.plan.to_json())
            on_stage(JobStage.LOADING, 0, planned.plan.unique_bytes)
            await self._roster.save(record, self._roster.live_job(job_id))
            weights = await self._admission.deltas.weights(
                planned.plan,
                planned.text,
                donor,
                watch=watch,
                on_progress=lambda _, done, total: on_stage(JobStage.LOADING, done, total),
            )
            await self._restorer.engine()  # of the moment, or the next one
            arrival = await self._admission.load(
                record,
                planned.text,
                planned.plan,
                weights,
                on_progress=lambda done, total: on_stage(JobStage.LOADING, done, total),
            )
        return record, planned, arrival

    async def _open(
        self, request: OnboardRequest, checked: Checked | None, watch: Stopwatch
    ) -> Source:
        """Reads what the request was checked against, or refuses what has taken its place."""
        if checked is not None:
            watch.add("open", checked.seconds)
        watch.enter("open")
        if checked is None:  # of the hub, or accepted in an earlier life, maybe under other roots
            source = await self._sources.read(request.source)
        else:
            await self._sources.find(request.source)
            source = await self._sources.read(request.source, identity=checked.identity)
        watch.stop()
        return source

    async def _publish(
        self,
        job_id: str,
        record: ModelRecord,
        planned: Planned,
        served: ServedModel,
        watch: Stopwatch,
    ) -> None:
        """Opens a loaded model to requests and stores that it is; takes it back if it cannot."""
        watch.enter("ready")
        self._catalog.publish(served)
        ready = replace(record, state=ModelState.READY, max_model_len=served.max_model_len)
        job = succeeded_job(
            self._roster.live_job(job_id),
            planned.plan,
            watch.to_json(),
            donor_choice=record.donor_choice,
        )
        try:
            await self._roster.save(ready, job)
        except NotReadyError:
            self._catalog.retract(record.name)
            await self._admission.unload(record.name)
            raise
        watch.stop()
        self._metrics.succeeded(watch.spent)  # at once: the job is seen to have succeeded
        await self._roster.settle(retimed_job(job, watch.to_json()))

    async def _choose_donor(
        self, request: OnboardRequest, source: Source, watch: Stopwatch, on_stage: OnStage
    ) -> ModelRecord:
        """Chooses the donor once all are resident; from here on it cannot be deleted."""
        async with self._named_donor(request) as asked:
            while True:
                await self._restorer.done.wait()
                await self._returning.recall_donors()
                await self._donors.compare(
                    asked, source, watch=watch, on_progress=as_progress(on_stage)
                )
                async with self._roster.names:
                    if not self._restorer.done.is_set():
                        continue  # the engine died while others held the names
                    choice = self._donors.choose(asked, source)
                    if choice is None:
                        continue  # a donor came while the others were looked at
                    donor = choice.donor
                    record = replace(
                        self._roster.model(request.name),
                        donor=None if donor is None else donor.name,
                        family=request.name if donor is None else donor.name,
                        donor_choice=choice.to_json(),
                    )
                    await self._roster.save(record)
                    return record

    @asynccontextmanager
    async def _named_donor(self, request: OnboardRequest) -> AsyncIterator[OnboardRequest]:
        """Keeps the donor resident that a request names, after bringing it back if need be.

        Yields:
            The request; where the donor that it names has been deleted, with the one that took its
            place.
        """
        donor = self._roster.model(request.name).donor
        if donor is None or self._roster.model(donor).state is not ModelState.UNLOADED:
            keeping: AbstractAsyncContextManager[object] = nullcontext()
        else:
            await self._restorer.done.wait()
            keeping = self._returning.leaning(request.name)
        async with keeping:
            gone = donor is not None and self._roster.find(request.donor or donor) is None
            yield replace(request, donor=donor) if gone else request
