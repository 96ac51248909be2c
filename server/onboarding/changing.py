"""Changes known models: what operators want of them, and their plans. Event loop only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.onboarding.departures import Departures
from server.onboarding.jobs import JobRunner
from server.onboarding.options import Options
from server.onboarding.queue_limit import QueueLimit
from server.onboarding.replan_jobs import ReplanJobs
from server.onboarding.replays import Once
from server.onboarding.roster import Roster
from server.registry.records import JobRecord
from server.settings import SharingSettings


class Changing:
    """Sets options and queues other plans.

    Args:
        roster: The known models.
        departures: Knows which models are leaving.
        jobs: Knows which models are being planned anew.
        replan_jobs: Queues other plans.
        limit: How many jobs may wait and run.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        departures: Departures,
        jobs: JobRunner,
        replan_jobs: ReplanJobs,
        limit: QueueLimit,
    ) -> None:
        self._roster = roster
        self._departures = departures
        self._jobs = jobs
        self._replan_jobs = replan_jobs
        self._limit = limit
        self._options = Options(roster)

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
                self._replan_jobs.check(name, said, defaults)
                if self._jobs.replanning(name) is None:
                    self._limit.check()
            await self._options.set(name, options)
            return (
                await self._replan_jobs.queue(name, said, defaults, once=once) if replans else None
            )
