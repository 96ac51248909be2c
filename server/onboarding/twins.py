"""Makes a variant's own weights resident beside the variant, to compare the two.

A twin holds what is byte-identical to the donor's as an alias and all else itself, so it answers as
the checkpoint does. It comes when it is asked for and leaves like a model, soon, or with its model.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from linker_core.errors import EngineFailureError, ModelNotFoundError
from server.onboarding.admission import Admission
from server.onboarding.deltas import Weights
from server.onboarding.planner import Planner
from server.onboarding.returning import Returning
from server.onboarding.roster import Roster
from server.onboarding.twin_rows import Twin, TwinRows, twin_name
from server.onboarding.unbroken import unbroken
from server.registry.records import ModelRecord, ModelState
from server.residency.catalog import Catalog, ServedModel

logger = logging.getLogger(__name__)


class Twins:
    """The unshared copies of variants. Event loop only.

    Args:
        rows: Their rows.
        roster: The known models.
        catalog: Filled with what is resident.
        planner: Plans them.
        admission: Loads them.
        returning: Brings back what they lean on, and models.

    Attributes:
        planner: As given.
    """

    def __init__(
        self,
        *,
        rows: TwinRows,
        roster: Roster,
        catalog: Catalog,
        planner: Planner,
        admission: Admission,
        returning: Returning,
    ) -> None:
        self._rows = rows
        self._roster = roster
        self._catalog = catalog
        self.planner = planner
        self._admission = admission
        self._returning = returning

    async def bring_back(self, name: str) -> ServedModel:
        """Makes a model or a twin resident; see `Returning.bring_back`.

        Raises:
            LinkerError: Why it cannot be loaded.
        """
        twin = self._rows.twin(name)
        if twin is None:
            return await self._returning.bring_back(name)
        assert self._catalog.turn(name).locked()
        owner = self._roster.model(twin.owner)
        async with AsyncExitStack() as until_loaded:
            if not await self._is_scanned(owner):
                # Before anything is leased: whoever plans holds it, and waits for donors then.
                await until_loaded.enter_async_context(self.planner.turn)
            head = await until_loaded.enter_async_context(self._returning.head(twin.owner))
            return await self._load(twin, owner, head)

    @asynccontextmanager
    async def away(self, owners: Iterable[str]) -> AsyncIterator[None]:
        """Takes the twins of models off the device, after their requests, and keeps them away.

        The caller holds no turn.

        Args:
            owners: The models; they may be known no more.
        """
        async with AsyncExitStack() as turns:
            for name in sorted(twin_name(owner) for owner in owners):  # or one comes meanwhile
                await turns.enter_async_context(self._catalog.turn(name))
                await unbroken(self._take_out(name))
            yield

    async def _is_scanned(self, owner: ModelRecord) -> bool:
        assert owner.plan is not None
        assert owner.fingerprint is not None
        compared_with = owner.plan["donor_fingerprint"]
        return await self.planner.is_scanned(compared_with, owner.fingerprint)

    async def _load(self, twin: Twin, owner: ModelRecord, head: ServedModel) -> ServedModel:
        """Loads a twin over the head of its model's family, which is leased."""
        assert owner.fingerprint is not None
        donor = head if owner.donor is not None else None
        text = await self._returning.text_side(owner, donor)
        plan = await self.planner.lossless(text, owner.fingerprint, head)
        row = replace(self._rows.named(twin.name), donor=head.name, plan=plan.to_json())
        weights = Weights(text.path, text.identity)
        engine = self._admission.engine_or_none()
        try:
            arrival = await self._admission.load(row, text, plan, weights)
        except EngineFailureError:
            died_of_it = engine is not None and twin.name in engine.lost_loads
            if died_of_it and self._rows.twin(twin.name) is not None:
                self._rows.note_crash(twin.name)
            raise
        if not self._returning.is_wanted(owner):
            await self._admission.unload(twin.name)
            raise ModelNotFoundError(f"The model {owner.name!r} was deleted meanwhile.")
        self._rows.note_loaded(twin.name, plan.to_json())
        self._catalog.publish(arrival.model)
        logger.info("model %s is resident", twin.name)
        return arrival.model

    async def _take_out(self, name: str) -> None:
        """Takes a twin off the device; its turn is held."""
        resident = self._catalog.get(name) is not None
        self._catalog.retract(name)
        await self._catalog.until_unused(name)
        if resident:
            await self._admission.unload(name)
        if self._rows.twin(name) is not None:
            self._rows.amend(name, state=ModelState.UNLOADED)
