"""Where the checkpoints of a study lie, once it is sure that they are still the ones rows mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from linker_core.errors import BadCheckpointError, LinkerError, from_record
from linker_core.weights.checkpoint import Identity
from server.onboarding.adapters import AdapterSide, Source
from server.onboarding.bases import Bases
from server.onboarding.planner import Planner
from server.onboarding.roster import Roster
from server.onboarding.sources import Sources
from server.residency.catalog import Catalog, TextSide
from server.studies.families import Family, Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A checkpoint's directory, and its weight files as they were when it was validated."""

    path: Path
    identity: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The checkpoints of one study."""

    base: Place
    variants: Mapping[str, Place]


class Locator(Protocol):
    """Finds the checkpoints of a study."""

    async def find(self, family: Family) -> Places:
        """Returns where they are.

        Raises:
            LinkerError: One of them cannot be read, or is not what it was.
        """


class Files:
    """The checkpoints of models. Event loop only.

    Args:
        roster: The known models.
        catalog: Knows the files of those that are or were resident.
        sources: Finds the others.
        planner: Knows fingerprints.
        bases: Has the bases of which no model is left.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        sources: Sources,
        planner: Planner,
        bases: Bases,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._sources = sources
        self._planner = planner
        self._bases = bases

    async def find(self, family: Family) -> Places:
        """Returns where a family's checkpoints are; what nobody has read yet is hashed.

        Raises:
            BadCheckpointError: One of them cannot be read, or its files were replaced.
            ModelNotFoundError: One was deleted meanwhile.
            NotReadyError: A download is gone, or the registry cannot be read.
        """
        assert family.base is not None
        return Places(
            base=await self._find(family.base),
            variants={str(each.name): await self._find(each) for each in family.variants},
        )

    async def _find(self, member: Member) -> Place:
        text = await self._text_side(member)
        return Place(path=text.path, identity=text.identity)

    async def _text_side(self, member: Member) -> TextSide:
        if member.name is None:
            return (await self._bases.find(member.fingerprint)).text
        served = self._catalog.get(member.name) or self._catalog.dormant(member.name)
        if served is not None and served.fingerprint == member.fingerprint:
            return served.text
        text = await self._read(member.name)
        if isinstance(text, AdapterSide) or text.delta is not None:
            raise replaced(member.name)
        if await self._planner.fingerprint(text, None) != member.fingerprint:
            raise replaced(member.name)
        return text

    async def _read(self, name: str) -> Source:
        """Validates a model's files anew; an error says whose they are."""
        try:
            return await self._sources.read(self._roster.model(name).source)
        except LinkerError as error:
            raise from_record(
                error.to_record() | {"message": f"{name}: {error.message}"}
            ) from error


def replaced(name: str) -> BadCheckpointError:
    """Returns what is said of files that are not the ones a row means."""
    return BadCheckpointError(
        f"{name}: its files are not the ones that were onboarded. Restore them, or onboard the "
        "model again."
    )
