"""The checkpoints that families share though no model of theirs is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from linker_core.errors import BadCheckpointError, NotReadyError, UnsupportedFormatError
from server.onboarding.adapters import AdapterSide
from server.onboarding.planner import Planner
from server.onboarding.sources import Sources
from server.registry.records import BaseRecord, Json
from server.registry.store import Registry
from server.residency.catalog import Base

logger = logging.getLogger(__name__)


class Bases:
    """The rows of such checkpoints, and their files. Event loop only.

    Args:
        registry: Has the rows.
        planner: Knows fingerprints.
        sources: Has the files.

    Attributes:
        rows: Held by whoever adds a base, until the plans that refer to it are known.
    """

    def __init__(self, *, registry: Registry, planner: Planner, sources: Sources) -> None:
        self._registry = registry
        self._planner = planner
        self._sources = sources
        self.rows = asyncio.Lock()

    async def find(self, fingerprint: str) -> Base:
        """Returns a base whose files are still the ones that plans were made against.

        Raises:
            BadCheckpointError: They are not, or are not there.
            NotReadyError: The registry cannot be read.
        """
        for record in await asyncio.to_thread(self._registry.bases):
            if record.fingerprint == fingerprint:
                return await self._read(record)
        raise BadCheckpointError(
            f"The registry does not say where the checkpoint {fingerprint} is, which the family of "
            "this model shares. Onboard that checkpoint, and then the model anew."
        )

    async def sources(self) -> list[str]:
        """Returns where the bases are, as rows have it.

        Raises:
            NotReadyError: The registry cannot be read.
        """
        return [base.source for base in await asyncio.to_thread(self._registry.bases)]

    async def sweep(self, plans: Callable[[], Iterable[Json]]) -> None:
        """Forgets the bases that none of the stored plans refers to."""
        async with self.rows:
            try:
                known = await asyncio.to_thread(self._registry.bases)
                needed = {plan["donor_fingerprint"] for plan in plans()}
                for fingerprint in {base.fingerprint for base in known} - needed:
                    await asyncio.to_thread(self._registry.delete_base, fingerprint)
            except NotReadyError as error:
                logger.warning("bases that nothing needs stay for now: %s", error.message)

    async def _read(self, record: BaseRecord) -> Base:
        why = "its files are not the ones that the plans were made against."
        try:
            text = await self._sources.read(record.source)
            whole = not isinstance(text, AdapterSide) and text.delta is None
            if whole and await self._planner.fingerprint(text, None) == record.fingerprint:
                assert not isinstance(text, AdapterSide)
                return Base(fingerprint=record.fingerprint, text=text)
        except (BadCheckpointError, UnsupportedFormatError) as error:
            why = error.message
        raise BadCheckpointError(
            "The checkpoint that the family of this model shares cannot be used; restore it. "
            f"{why[0].upper()}{why[1:]}"
        )
