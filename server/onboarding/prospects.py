"""Which donors may yet come. Event loop only."""

from __future__ import annotations

from server.onboarding.jobs import JobRunner
from server.onboarding.request import AUTO_DONOR, OnboardRequest
from server.onboarding.restorer import Restorer
from server.onboarding.roster import Roster
from server.registry.records import ModelState
from server.residency.catalog import Catalog


class Prospects:
    """Says whether a donor that is not here now is on its way.

    Args:
        roster: The known models.
        catalog: The resident models.
        jobs: May bring donors.
        restorer: Brings donors back.
    """

    def __init__(
        self, *, roster: Roster, catalog: Catalog, jobs: JobRunner, restorer: Restorer
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._jobs = jobs
        self._restorer = restorer

    def is_coming(self, donor: str | None) -> bool:
        """Whether a donor is known and on its way, or on its way back."""
        record = None if donor is None else self._roster.find(donor)
        return (
            record is not None
            and record.state in (ModelState.ONBOARDING, ModelState.READY)
            and self._catalog.get(record.name) is None
        )

    def may_find_donor(self, request: OnboardRequest) -> bool:
        """Whether a model without a donor so far may yet get one."""
        waiting = self._jobs.num_live > 0 or not self._restorer.done.is_set()
        return request.donor == AUTO_DONOR and waiting
