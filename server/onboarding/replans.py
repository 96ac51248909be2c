"""Gives variants another plan while they serve.

Until the engine has the new plan the old one serves and is what is stored; a failure, or the end of
the server, leaves it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from linker_core.errors import (
    BadCheckpointError,
    ConflictError,
    InvalidRequestError,
    NotReadyError,
)
from linker_core.sharing.plan import Policy, SharePlan
from server.onboarding.admission import Admission
from server.onboarding.deltas import Weights
from server.onboarding.outcomes import succeeded_job
from server.onboarding.planner import OnStage, Planned, Planner
from server.onboarding.request import OnboardRequest, check_sharing, resolve_sharing
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.onboarding.timing import Stopwatch
from server.registry.records import SERVABLE, JobStage, ModelRecord, ModelState
from server.residency.catalog import Catalog
from server.settings import SharingSettings


class Replans:
    """Plans variants anew. Event loop only.

    Args:
        roster: The known models and jobs.
        catalog: The resident models.
        planner: Decides what is stored.
        admission: Loads what was planned.
        restorer: Says when models are resident, and has who brings back their donors.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        planner: Planner,
        admission: Admission,
        restorer: Restorer,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._planner = planner
        self._admission = admission
        self._restorer = restorer
        self._returning = restorer.returning

    def asked(
        self, name: str, said: Mapping[str, Any], defaults: SharingSettings
    ) -> OnboardRequest:
        """Returns a model's request with another policy and options.

        Args:
            name: The model.
            said: `policy` and options as in onboarding; what is open is filled in as there.
            defaults: The settings.

        Raises:
            ModelNotFoundError: There is none of that name.
            ConflictError: It has no plan yet, or is a donor.
            NotReadyError: It is on its way back.
            InvalidRequestError: Nothing is said, the options contradict each other, or the model
                came with a plan of its own.
        """
        record = self._planned(name)
        if record.donor is None:
            raise ConflictError(
                f"The model {name!r} is a donor, whose weights others lean on; only variants have "
                "a plan to change."
            )
        assert record.plan is not None
        if record.plan["policy"] in (Policy.DELTA, Policy.ADAPTER):
            raise InvalidRequestError(
                f"The model {name!r} came with a plan of its own. Onboard its checkpoint to have "
                "it planned.",
                param="policy",
            )
        if all(value is None for value in said.values()):
            raise InvalidRequestError("Say a policy, or options of one.", param="policy")
        options = resolve_sharing(said, defaults)
        request = replace(OnboardRequest.from_json(record.request), **options)
        check_sharing(request)
        return request

    async def run(self, job_id: str, *, on_stage: OnStage) -> None:
        """Does what a job of `asked` asks for; the model's row and the job's say so in the end.

        Raises:
            LinkerError: Any reason why the model keeps its plan.
        """
        job = self._roster.live_job(job_id)
        request, watch = OnboardRequest.from_json(job.request), Stopwatch()
        await self._restorer.done.wait()
        record = self._planned(job.model)
        watch.enter("open")
        source = await self._returning.sources.read(record.source)
        watch.stop()
        async with self._planner.turn, self._returning.leaning(job.model) as donor:
            assert donor is not None
            planned = await self._planner.plan(
                request, source, donor, watch=watch, on_stage=on_stage
            )
            if planned.fingerprint != record.fingerprint:
                raise BadCheckpointError(
                    "The model's files are not the ones it was onboarded from. Restore them, or "
                    "delete the model and onboard it again."
                )
            on_stage(JobStage.LOADING, 0, planned.plan.unique_bytes)
            weights = await self._admission.deltas.weights(
                planned.plan,
                planned.text,
                donor,
                watch=watch,
                on_progress=lambda _, done, total: on_stage(JobStage.LOADING, done, total),
            )
            await self._switch(job_id, request, planned, weights, watch, on_stage)

    async def _switch(
        self,
        job_id: str,
        request: OnboardRequest,
        planned: Planned,
        weights: Weights,
        watch: Stopwatch,
        on_stage: OnStage,
    ) -> None:
        """Lets the engine change over if it has the model, then stores that it has."""
        await self._restorer.engine()
        async with self._catalog.turn(request.name):
            record = self._planned(request.name)
            resident = self._catalog.get(request.name) is not None
            if resident and not _has_rungs(record, planned.plan):
                arrival = await self._admission.load(
                    record,
                    planned.text,
                    planned.plan,
                    weights,
                    replaces=True,
                    on_progress=lambda done, total: on_stage(JobStage.LOADING, done, total),
                )
                self._catalog.publish(arrival.model)
                watch.add("alias", arrival.alias_seconds)
                watch.add("move", arrival.move_seconds)
                watch.add("ready", arrival.first_token_seconds)
            changed = replace(
                self._roster.model(request.name),
                request=request.to_json(),
                plan=planned.plan.to_json(),
            )
            job = succeeded_job(self._roster.live_job(job_id), planned.plan, watch.to_json())
            # Stored later if the registry is locked: the engine has the new plan already.
            await self._roster.settle(changed, job)

    def _planned(self, name: str) -> ModelRecord:
        """Returns a model that can be served.

        Raises:
            ModelNotFoundError: There is none of that name.
            ConflictError: It is being onboarded, or has failed.
            NotReadyError: It is on its way back.
        """
        record = self._roster.model(name)
        if record.state not in SERVABLE:
            raise ConflictError(
                f"The model {name!r} is {record.state.value}; only one that can be served is "
                "planned anew."
            )
        if record.state is ModelState.READY and self._catalog.get(name) is None:
            raise NotReadyError(f"The model {name!r} is on its way back; try again then.")
        return record


def _has_rungs(record: ModelRecord, plan: SharePlan) -> bool:
    """Whether the resident plan stores the same in the same form."""
    return record.plan is not None and record.plan["rungs"] == plan.to_json()["rungs"]
