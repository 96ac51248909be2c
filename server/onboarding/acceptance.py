"""Takes onboarding requests: what can be checked is checked at once, the rest is queued.

Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from linker_core.errors import ConflictError, InvalidRequestError
from server.onboarding.adapters import Source
from server.onboarding.admission import Admission
from server.onboarding.departures import Departures
from server.onboarding.donors import Donors
from server.onboarding.jobs import JobRunner
from server.onboarding.live_job import Checked
from server.onboarding.options import Options
from server.onboarding.prepare import read_source
from server.onboarding.prospects import Prospects
from server.onboarding.queue_limit import QueueLimit
from server.onboarding.replays import Once
from server.onboarding.request import OnboardRequest, check_name, check_sharing
from server.onboarding.roster import Roster
from server.onboarding.sources import Sources
from server.registry.records import JobRecord, ModelState


class Acceptance:
    """Checks requests and makes jobs of them.

    Args:
        roster: The known models and jobs.
        sources: Finds what requests mean.
        departures: Knows which names are not free yet.
        admission: Knows what there is room for.
        donors: Chooses donors.
        prospects: Says which may yet come.
        jobs: Takes the jobs.
        limit: How many may wait and run.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        sources: Sources,
        departures: Departures,
        admission: Admission,
        donors: Donors,
        prospects: Prospects,
        jobs: JobRunner,
        limit: QueueLimit,
    ) -> None:
        self._roster = roster
        self._sources = sources
        self._departures = departures
        self._admission = admission
        self._donors = donors
        self._prospects = prospects
        self._jobs = jobs
        self._limit = limit
        self._options = Options(roster)

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
            options: See `Options.set`. They are no part of the request: one that is otherwise the
                same sets them.
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
            request = found.meant_by(request, said)
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

    async def _check_free(
        self, request: OnboardRequest, options: Mapping[str, Any], once: Once | None
    ) -> JobRecord | None:
        """Returns the job of an identical request; refuses a taken name and a full queue."""
        same = await self._identical(request)
        if same is None:
            self._limit.check()
            return None
        await self._options.set(request.name, options)
        if once is not None:
            await self._roster.save(once.used_for(same.id))
        return same

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
        if unloaded or self._prospects.is_coming(request.donor):
            return  # the job checks it then
        try:
            donor = self._donors.likely(request, source)
        except (ConflictError, InvalidRequestError):
            if not self._prospects.may_find_donor(request):
                raise
            return  # that of a delta, or an adapter's base, may be among those
        if donor is None and self._prospects.may_find_donor(request):
            return
        self._admission.room.check(
            self._admission.least_bytes(request, source, donor),
            what=f"The model {request.name!r}",
            keep=frozenset() if donor is None else frozenset({donor.name}),
        )
