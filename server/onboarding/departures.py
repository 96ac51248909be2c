"""Deletes models: rows first, then the engine, after the sequences that still run.

The event loop owns all state here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from linker_core.errors import ConflictError, EngineFailureError
from server.bridge.client import EngineClient
from server.onboarding.roster import Roster
from server.registry.records import ModelState
from server.residency.catalog import Catalog

logger = logging.getLogger(__name__)


class Departures:
    """The models that are leaving.

    Args:
        roster: The known models.
        catalog: The resident models.
        is_replanning: Whether a ready model waits for another plan.
        names: Guards checks of names and donors together with the changes that follow from them.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        is_replanning: Callable[[str], bool],
        names: asyncio.Lock,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._is_replanning = is_replanning
        self._names = names
        # Deleted, but not yet out of the engine, each with its donor, which it still reads from.
        self._leaving: dict[str, str | None] = {}

    async def delete(self, name: str, *, engine: EngineClient | None) -> None:
        """Forgets a model: new requests are refused, running ones finish, its bytes are freed.

        Raises:
            ModelNotFoundError: There is none of that name.
            ConflictError: It is being onboarded or planned anew, or other models lean on it.
            NotReadyError: The registry cannot be written; the model stays as it is.
        """
        async with self._names:
            record = self._roster.model(name)
            self._check_unused(name, record.state)
            await self._roster.forget(name)
            self._catalog.retract(name)
            self._leaving[name] = record.donor
        try:
            # Also what is not resident yet: it may be on its way back into the engine.
            if engine is not None and record.state is ModelState.READY:
                await engine.unload(name)
        except EngineFailureError:
            logger.info("the engine ended before it had unloaded %s", name)
        finally:
            del self._leaving[name]

    def check_gone(self, name: str) -> None:
        """Refuses a name whose last holder is still in the engine.

        Raises:
            ConflictError: It is.
        """
        if name in self._leaving:
            raise ConflictError(f"The model {name!r} is being deleted; try again afterwards.")

    def _check_unused(self, name: str, state: ModelState) -> None:
        if state is ModelState.ONBOARDING:
            raise ConflictError(f"The model {name!r} is being onboarded; delete it afterwards.")
        if self._is_replanning(name):
            raise ConflictError(f"The model {name!r} is being planned anew; delete it afterwards.")
        leaving = [model for model, donor in self._leaving.items() if donor == name]
        dependants = self._roster.dependants(name) + leaving
        if dependants:
            raise ConflictError(
                f"The model {name!r} is the donor of {', '.join(dependants)}; delete those first."
            )
