"""Dry runs: what onboarding would do, and which plans of several variants fit together.

Event loop only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from linker_core.errors import NotReadyError
from linker_core.weights.architecture import ModelConfig
from server.onboarding.adapters import Source
from server.onboarding.admission import Admission
from server.onboarding.donor_choice import DonorChoice
from server.onboarding.donors import Donors
from server.onboarding.fitting import FitRequest, Fitting, JointPlan
from server.onboarding.planner import OnStage, Planner, as_progress
from server.onboarding.prospects import Prospects
from server.onboarding.queue_limit import QueueLimit
from server.onboarding.rehearsal import DryRun, Rehearsal
from server.onboarding.request import OnboardRequest, check_name, check_sharing
from server.onboarding.restorer import Restorer
from server.onboarding.sources import ignore_bytes
from server.onboarding.timing import Stopwatch


class DryRuns:
    """Answers without loading or keeping anything but scans and prices.

    Args:
        planner: Plans.
        admission: Knows the engine's memory.
        restorer: Says when donors are resident, and has the sources.
        donors: Chooses donors.
        prospects: Says which may yet come.
        limit: How many may wait and run.
    """

    def __init__(
        self,
        *,
        planner: Planner,
        admission: Admission,
        restorer: Restorer,
        donors: Donors,
        prospects: Prospects,
        limit: QueueLimit,
    ) -> None:
        self._restorer = restorer
        self._sources = restorer.returning.sources
        self._donors = donors
        self._prospects = prospects
        self._limit = limit
        self._rehearsal = Rehearsal(
            choose=self._choose_donor_now, planner=planner, admission=admission
        )
        self._fitting = Fitting(choose=self._choose_donor_now, planner=planner)

    async def rehearse(
        self, request: OnboardRequest, *, said: Mapping[str, Any] = MappingProxyType({})
    ) -> DryRun:
        """Answers what onboarding would do.

        Cancelling it ends what it has started. The arguments are those of `Acceptance.submit`.

        Raises:
            LinkerError: Source, checkpoint, donor or options rule the model out, or too many wait.
        """
        if request.name:
            check_name(request.name)
        check_sharing(request)
        found = await self._sources.find(request.source)
        request = found.meant_by(request, said)
        with self._rehearsing(request.donor), self._sources.held(found.source):
            path = await self._sources.path(found.source, on_progress=ignore_bytes)
            return await self._rehearsal.run(request, path)

    async def fit(self, request: FitRequest) -> JointPlan:
        """Chooses plans of several variants that fit together.

        Raises:
            LinkerError: A source, a checkpoint or the donor rule it out, or too many wait.
        """
        found = [(await self._sources.find(source)).source for source in request.sources.values()]
        with self._rehearsing(request.donor), ExitStack() as held:
            for source in found:
                held.enter_context(self._sources.held(source))
            paths = [await self._sources.path(source, on_progress=ignore_bytes) for source in found]
            return await self._fitting.run(request, paths)

    @contextmanager
    def _rehearsing(self, donor: str | None) -> Iterator[None]:
        """Counts a dry run among what waits and runs.

        Raises:
            NotReadyError: Models to share with are on their way.
            QueueFullError: Too many wait.
        """
        if self._prospects.is_coming(donor) or not self._restorer.done.is_set():
            raise _not_here_yet()
        with self._limit.rehearsing():
            yield

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
        if not self._prospects.is_coming(request.donor):
            await self._restorer.returning.recall_donors()
            choice = await self._donors.settle(
                request, source, watch=watch, on_progress=as_progress(on_stage)
            )
            if choice.donor is not None or not self._prospects.may_find_donor(request):
                return choice
        raise _not_here_yet()


def _not_here_yet() -> NotReadyError:
    return NotReadyError("The models to share with are still on their way; try again.")
