"""Takes models out for good, and donors out of their families.

Rows change first, then the engine, after whoever still uses the model. Event loop only.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress

from linker_core.errors import ConflictError, EngineFailureError
from server.onboarding.admission import Admission
from server.onboarding.bases import Bases
from server.onboarding.roster import Roster
from server.onboarding.twins import Twins
from server.onboarding.unbroken import unbroken
from server.registry.records import ModelRecord, ModelState
from server.residency.catalog import Catalog
from server.residency.evictions import Evictions
from server.residency.rehoming import best_heir, rows_after

logger = logging.getLogger(__name__)


class Departures:
    """The models that are leaving.

    Args:
        roster: The known models.
        catalog: The resident models.
        admission: Has the engine.
        evictions: Takes out what stays servable.
        bases: Keeps what families share whose donor goes.
        twins: Leave with their models, and before what they lean on.
        is_replanning: Whether a ready model waits for another plan.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        admission: Admission,
        evictions: Evictions,
        bases: Bases,
        twins: Twins,
        is_replanning: Callable[[str], bool],
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._admission = admission
        self._evictions = evictions
        self._bases = bases
        self._twins = twins
        self._is_replanning = is_replanning
        # Deleted, but not yet out of the engine, each with its donor, which it still reads from.
        self._leaving: dict[str, str | None] = {}

    async def delete(self, name: str, *, rehome: bool = False) -> None:
        """Forgets a model: new requests are refused, running ones finish, its bytes are freed.

        Args:
            name: The model.
            rehome: Whether the best of its variants becomes their donor. They keep what they
                share with it, and every answer stays as it is.

        Raises:
            ModelNotFoundError: There is none of that name.
            ConflictError: It or a variant of it is being onboarded or planned anew, or variants
                lean on it and none takes its place.
            NotReadyError: The registry cannot be written; the model stays as it is.
        """
        if rehome and self._roster.dependants(name):
            await unbroken(self._rehome(name, stays=False))
        else:
            await unbroken(self._delete(name))

    async def unload(self, name: str, *, rehome: bool = False) -> None:
        """Takes a model off the device; requests bring it back.

        Args:
            name: The model.
            rehome: Whether the best of the variants that lean on it now becomes their donor. It
                comes back as a variant of that one, which holds nothing of its own.

        Raises:
            ModelNotFoundError: There is none of that name.
            ConflictError: Resident variants lean on it and none takes its place, or one of the
                family is being onboarded or planned anew.
            NotReadyError: It is on its way back, the engine is, or the registry cannot be written.
        """
        if rehome and self._catalog.dependants(name):
            await unbroken(self._rehome(name, stays=True))
            self._evictions.note_request(name)
            return
        self._check_settled(self._roster.model(name))
        variants = self._roster.dependants(name)
        for variant in variants:
            self._check_settled(self._roster.model(variant))
        stays = any(self._catalog.get(variant) is not None for variant in variants)
        async with self._twins.away((name,) if stays else (name, *variants)):
            await self._evictions.unload(name)

    def check_gone(self, name: str) -> None:
        """Refuses a name whose last holder is still in the engine.

        Raises:
            ConflictError: It is.
        """
        if name in self._leaving:
            raise ConflictError(f"The model {name!r} is being deleted; try again afterwards.")

    def check_unused(self, name: str) -> None:
        """Refuses to take a model away that others lean on, or whose job is under way.

        Raises:
            ModelNotFoundError: There is none of that name.
            ConflictError: See above; lists the others.
        """
        self._check_settled(self._roster.model(name))
        if dependants := self._dependants(name):
            raise ConflictError(
                f"The model {name!r} is the donor of {', '.join(dependants)}; delete those first, "
                "or let one of them take its place with rehome=true."
            )

    async def _delete(self, name: str) -> None:
        async with self._roster.names:
            self.check_unused(name)
            record = self._roster.model(name)
            await self._roster.replace(delete=(name,))
            self._catalog.retract(name)
            self._leaving[name] = record.donor
        try:
            engine = self._admission.engine_or_none()
            await self._catalog.until_unused(name)
            # Also what is not resident yet: it may be on its way back into the engine.
            async with self._twins.away((name,)):
                if engine is not None and record.state is not ModelState.FAILED:
                    await engine.unload(name)
        except EngineFailureError:
            logger.info("the engine ended before it had unloaded %s", name)
        finally:
            del self._leaving[name]

    async def _rehome(self, name: str, *, stays: bool) -> None:
        async with AsyncExitStack() as own_turn:
            family = (name, *self._roster.dependants(name))
            async with self._twins.away(family), AsyncExitStack() as heirs_turn:
                heir = None
                while heir is None:
                    heir = await self._bequeath(name, heirs_turn, own_turn, stays=stays)
                own_turn.callback(self._leaving.pop, name, None)
                unloading = await self._leave_engine(name, heir)
            if unloading is not None:
                with suppress(EngineFailureError):  # it took everything with it
                    await unloading

    async def _bequeath(
        self, name: str, heirs_turn: AsyncExitStack, own_turn: AsyncExitStack, *, stays: bool
    ) -> str | None:
        """Gives a family another donor in rows and catalog; None if it has to be tried again.

        None of the variants is on its way in or out meanwhile, so those that the catalog does not
        have the engine does not have either. The turns of both donors are held from then on: nobody
        is loaded over the old one or the new one until the engine knows.
        """
        heir, variants = self._heir(name), set(self._roster.dependants(name))
        async with AsyncExitStack() as turns:
            for variant in sorted(variants):
                stack = heirs_turn if variant == heir else turns
                await stack.enter_async_context(self._catalog.turn(variant))
            await own_turn.enter_async_context(self._catalog.turn(name))
            async with self._roster.names:
                same = variants == set(self._roster.dependants(name)) and heir == self._heir(name)
                if same:
                    await self._store_heir(name, heir, stays=stays)
                    return heir
        await own_turn.aclose()
        await heirs_turn.aclose()
        return None

    async def _store_heir(self, name: str, heir: str, *, stays: bool) -> None:
        variants = [self._roster.model(model) for model in self._roster.dependants(name)]
        donor, successor = self._roster.model(name), self._roster.model(heir)
        rows = rows_after(donor, successor, variants, stays=stays)
        async with self._bases.rows:
            await self._roster.replace(delete=() if stays else (name,), save=rows)
        self._catalog.rehome(name, heir)
        for model, donor_name in self._leaving.items():
            if donor_name == name:
                self._leaving[model] = heir
        if stays:
            self._catalog.park(name)
        else:
            self._catalog.retract(name)
            self._leaving[name] = heir
        logger.info("model %s is the donor in the place of %s", heir, name)

    async def _leave_engine(self, name: str, heir: str) -> Awaitable[None] | None:
        """Tells the engine once nobody uses the model; returns what says that it has gone."""
        engine = self._admission.engine_or_none()
        resident = self._catalog.get(heir) is not None
        await self._catalog.until_unused(name)
        if engine is None or engine.closed.is_set():
            return None
        return engine.unloading(name, heir=heir if resident else None)

    def _heir(self, name: str) -> str:
        """Returns the variant that is to be the donor.

        Raises:
            ModelNotFoundError: There is no model of that name.
            ConflictError: A job of the family is under way, or no variant can be the donor.
        """
        self._check_settled(self._roster.model(name))
        variants = [self._roster.model(model) for model in self._roster.dependants(name)]
        for variant in variants:
            self._check_settled(variant)
        found = best_heir(variants, is_resident=lambda model: self._catalog.get(model) is not None)
        leaving = self._leaving_from(name)
        if found is None or (leaving and self._catalog.get(found.name) is None):
            dependants = ", ".join(self._dependants(name))
            raise ConflictError(
                f"The model {name!r} is the donor of {dependants}, none of which can take its "
                "place now; delete those first."
            )
        return found.name

    def _check_settled(self, record: ModelRecord) -> None:
        if record.state is ModelState.ONBOARDING:
            raise ConflictError(f"The model {record.name!r} is being onboarded; try again then.")
        if self._is_replanning(record.name):
            raise ConflictError(f"The model {record.name!r} is being planned anew; try again then.")

    def _dependants(self, name: str) -> Sequence[str]:
        return self._roster.dependants(name) + self._leaving_from(name)

    def _leaving_from(self, name: str) -> list[str]:
        return [model for model, donor in self._leaving.items() if donor == name]
