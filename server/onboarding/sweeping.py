"""Removes stored deltas, bases and downloads that no model needs. Event loop only."""

from __future__ import annotations

import logging

from linker_core.errors import LinkerError
from server.onboarding.bases import Bases
from server.onboarding.deltas import Deltas
from server.onboarding.planner import Planner
from server.onboarding.roster import Roster
from server.onboarding.sources import Sources

logger = logging.getLogger(__name__)


class Sweeping:
    """Sweeps what onboarding stores.

    Args:
        roster: The known models, which say what is needed.
        planner: Has the turn of whoever plans, whose files no row speaks of yet.
        deltas: What variants store.
        bases: What families share whose donor has gone.
        sources: What was downloaded.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        planner: Planner,
        deltas: Deltas,
        bases: Bases,
        sources: Sources,
    ) -> None:
        self._roster = roster
        self._planner = planner
        self._deltas = deltas
        self._bases = bases
        self._sources = sources

    async def sweep(self) -> None:
        """Removes what no model needs.

        What cannot be removed now stays for a later sweep: nobody's request depends on it.
        """
        try:
            await self._sweep()
        except (LinkerError, OSError) as error:
            logger.warning("what no model needs stays for now: %s", error)

    async def _sweep(self) -> None:
        idle = not self._planner.turn.locked()
        await self._deltas.sweep(self._roster.plans(), settled=idle)
        await self._bases.sweep(self._roster.plans)
        # A donor's checkpoint that becomes a base meanwhile is among either.
        before = self._sources_of_models()
        bases = await self._bases.sources()
        await self._sources.sweep(lambda: [*before, *bases, *self._sources_of_models()])

    def _sources_of_models(self) -> list[str]:
        return [model.source for model in self._roster.models()]
