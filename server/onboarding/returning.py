"""Brings a stored model back into the engine, with its stored plan, after what it leans on."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import NamedTuple

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    ModelNotFoundError,
    NotReadyError,
    UnsupportedFormatError,
    UnusableModelError,
)
from linker_core.sharing.plan import SharePlan
from server.onboarding.admission import Admission
from server.onboarding.bases import Bases
from server.onboarding.outcomes import failed_model
from server.onboarding.planner import Planner, ignore_progress
from server.onboarding.roster import Roster
from server.onboarding.sources import Sources
from server.onboarding.timing import Stopwatch
from server.registry.records import SERVABLE, ModelRecord, ModelState
from server.residency.catalog import Base, Catalog, ServedModel, TextSide

logger = logging.getLogger(__name__)

_CRASHES_PER_MODEL = 2  # that many engine deaths while loading a stored model mark it failed

OnChanged = Callable[[ModelRecord], Awaitable[bool]]


class _Known(NamedTuple):
    """What a model is loaded with besides its weights."""

    text: TextSide
    base: Base | None  # of a head that is not its family's base


class _Key(NamedTuple):
    """One model; another one of its name, after it was deleted, has another key."""

    name: str
    created_at: float


def _key(record: ModelRecord) -> _Key:
    return _Key(record.name, record.created_at)


class Returning:
    """Loads what has a plan and is not resident.

    Args:
        roster: The known models.
        catalog: Filled with what is resident.
        planner: Knows fingerprints.
        admission: Loads models.
        bases: Has what families share whose first donor has gone.
        sources: Has the models' files.

    Attributes:
        bases: As given.
        sources: As given.

    `on_changed` is asked about a model whose files are others than it was onboarded from; it
    returns whether the model is being onboarded anew.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        planner: Planner,
        admission: Admission,
        bases: Bases,
        sources: Sources,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._planner = planner
        self._admission = admission
        self.bases = bases
        self.sources = sources
        self._loading: list[_Key] = []  # what the engine may be loading for us
        self._strikes: dict[_Key, int] = {}
        self.on_changed: OnChanged = _leave_it

    async def bring_back(self, name: str, *, may_evict: bool = True) -> ServedModel:
        """Makes a model resident that was ready before. The caller holds the catalog's turn.

        Its donor comes first. One whose files are damaged or others, or which gives no first token,
        is marked failed; any other error leaves it as it was.

        Args:
            name: The model.
            may_evict: Whether idle models leave for it.

        Raises:
            ModelNotFoundError: There is none of that name any more.
            NotReadyError: It is not servable, or its donor is not, or the engine is not there.
            InsufficientCapacityError: There is no room for it.
            LinkerError: Why it cannot be loaded.
        """
        assert self._catalog.turn(name).locked()
        record = self._roster.model(name)
        if (served := self._catalog.get(name)) is not None:
            return served
        if record.state not in SERVABLE:
            raise NotReadyError(f"The model {name!r} is {record.state.value}.")
        try:
            async with self.leaning(name, may_evict=may_evict) as donor:
                return await self._bring_back(self._roster.model(name), donor, may_evict=may_evict)
        except (BadCheckpointError, UnsupportedFormatError, UnusableModelError) as error:
            if self.is_wanted(record):
                logger.error("model %s cannot come back: %s", name, error.message)
                self._catalog.retract(name)  # what was known of it is no more
                await self._roster.settle(failed_model(self._roster.model(name), error))
            raise

    @asynccontextmanager
    async def leaning(
        self, name: str, *, may_evict: bool = True
    ) -> AsyncIterator[ServedModel | None]:
        """Keeps a model's donor where it is, after bringing it back if need be.

        The caller holds at most the model's own turn.

        Yields:
            What the model is planned against and loaded over; None if it has no donor.

        Raises:
            LinkerError: See `bring_back`, of the donor.
        """
        with ExitStack() as leases:
            donor: ServedModel | None = None
            while (needed := self._roster.model(name).donor) is not None and donor is None:
                donor = await self._leased(name, needed, leases, may_evict=may_evict)
            yield donor

    @asynccontextmanager
    async def head(self, name: str) -> AsyncIterator[ServedModel]:
        """Keeps the head of a model's family where it is: its donor, or the model itself.

        The caller holds neither's turn.

        Yields:
            What the model's twin is planned against and loaded over.

        Raises:
            LinkerError: See `bring_back`, of the head.
        """
        with ExitStack() as leases:
            head: ServedModel | None = None
            while head is None:
                needed = self._roster.model(name).donor
                head = await self._leased(name, needed, leases, may_evict=True)
            yield head

    async def text_side(self, record: ModelRecord, donor: ServedModel | None) -> TextSide:
        """Returns what of a model is not weights, as it was onboarded; reads it if need be.

        Args:
            record: A model that is servable.
            donor: What it leans on, as `leaning` yields it.

        Raises:
            LinkerError: Its files cannot be read, or are others by now.
        """
        assert record.plan is not None
        served = self._catalog.get(record.name)
        if served is not None and served.fingerprint == record.fingerprint:
            return served.text
        plan = SharePlan.from_json(record.plan)
        known = self._remembered(record) or await self._read(record, plan, donor)
        return known.text

    async def recall_donors(self) -> None:
        """Reads what is not known of unloaded donors, so that models can be planned against them.

        One that cannot be read is as good as none now, and says so when it has to come back.
        """
        for record in self._roster.models():
            if record.state is not ModelState.UNLOADED or record.donor is not None:
                continue
            # Without its turn: a request that waits for room may hold that for long.
            if self._is_unknown(record):
                with suppress(LinkerError):
                    await self._recall(record)

    def is_wanted(self, record: ModelRecord) -> bool:
        """Whether the model is still the one of this record: not deleted, not onboarded anew."""
        now = self._roster.find(record.name)
        return now is not None and now.state in SERVABLE and now.created_at == record.created_at

    def engine_down(self) -> None:
        """Counts the engine's death against what it was loading."""
        for key in self._loading:
            self._strikes[key] = self._strikes.get(key, 0) + 1

    async def give_up_killers(self) -> None:
        """Marks failed what the engine died of again and again."""
        for key, strikes in list(self._strikes.items()):
            record = self._roster.find(key.name)
            if record is None or _key(record) != key:
                self._strikes.pop(key, None)  # deleted, or onboarded anew
            elif strikes >= _CRASHES_PER_MODEL:
                error = EngineFailureError("The engine died repeatedly while it loaded this model.")
                self._catalog.retract(key.name)
                await self._roster.settle(failed_model(record, error))
                self._strikes.pop(key, None)

    def _is_unknown(self, record: ModelRecord) -> bool:
        known = self._catalog.get(record.name) or self._catalog.dormant(record.name)
        return known is None and self._roster.find(record.name) is record

    async def _recall(self, record: ModelRecord) -> None:
        assert record.plan is not None
        assert record.fingerprint is not None
        known = await self._read(record, SharePlan.from_json(record.plan), None)
        if self._is_unknown(record):
            limits = known.text.config.max_position_embeddings
            self._catalog.remember(
                ServedModel(
                    name=record.name,
                    donor=None,
                    position=record.position,
                    created_at=record.created_at,
                    fingerprint=record.fingerprint,
                    max_model_len=record.max_model_len or limits,
                    text=known.text,
                    base=known.base,
                )
            )

    async def _leased(
        self, name: str, donor: str | None, leases: ExitStack, *, may_evict: bool
    ) -> ServedModel | None:
        """Brings a model's donor back, or the model where it has none, and leases it.

        Returns:
            What the family's plans are compared with; None: the family has another donor by now.
        """
        needed = donor or name
        async with self._catalog.turn(needed):
            if self._roster.model(name).donor != donor:
                return None
            held = await self._donor(needed, may_evict=may_evict)
            leases.enter_context(self._catalog.lease(needed))
            return held.lender

    async def _donor(self, name: str, *, may_evict: bool) -> ServedModel:
        try:
            return await self.bring_back(name, may_evict=may_evict)
        except InsufficientCapacityError:
            raise
        except LinkerError as error:
            raise NotReadyError(f"Its donor {name!r} cannot be loaded. {error.message}") from error

    async def _bring_back(
        self, record: ModelRecord, donor: ServedModel | None, *, may_evict: bool
    ) -> ServedModel:
        assert record.plan is not None
        plan = SharePlan.from_json(record.plan)
        known = self._remembered(record) or await self._read(record, plan, donor)
        lender = donor if known.base is None else _as_lender(known.base, record)
        weights = await self._admission.deltas.weights(
            plan, known.text, lender, watch=Stopwatch(), on_progress=ignore_progress
        )
        if not self.is_wanted(record):
            raise _gone(record.name)
        self._loading.append(_key(record))
        try:
            arrival = await self._admission.load(
                record, known.text, plan, weights, base=known.base, may_evict=may_evict
            )
        finally:
            self._loading.remove(_key(record))
        self._strikes.pop(_key(record), None)
        if not self.is_wanted(record):
            await self._admission.unload(record.name)
            raise _gone(record.name)
        self._catalog.publish(arrival.model)
        logger.info("model %s is back", record.name)
        self._note_ready(record.name)
        return arrival.model

    def _note_ready(self, name: str) -> None:
        now = self._roster.model(name)
        if now.state is not ModelState.READY or now.error is not None:
            self._roster.amend(name, state=ModelState.READY, error=None)

    def _remembered(self, record: ModelRecord) -> _Known | None:
        """Returns what is known of a model since it was resident; the engine checks its files."""
        dormant = self._catalog.dormant(record.name)
        if dormant is None or dormant.fingerprint != record.fingerprint:
            return None
        return _Known(dormant.text, dormant.base)

    async def _read(
        self, record: ModelRecord, plan: SharePlan, donor: ServedModel | None
    ) -> _Known:
        """Reads a model's files, which have to be those that it was onboarded from.

        Raises:
            BadCheckpointError: They are others.
            NotReadyError: They are others, and are being onboarded.
        """
        base: Base | None = None
        if donor is None and plan.donor_fingerprint is not None:
            base = await self.bases.find(plan.donor_fingerprint)
            donor = _as_lender(base, record)
        source = await self.sources.read(record.source)
        if await self._planner.fingerprint(source, donor) != record.fingerprint:
            if self.is_wanted(record) and await self.on_changed(record):
                raise NotReadyError("The model's files have changed; it is being onboarded anew.")
            raise BadCheckpointError(
                "The model's files are not the ones it was onboarded from. Restore them, or "
                "delete the model and onboard it again."
            )
        return _Known(await self._planner.text_side(source, donor), base)


def _as_lender(base: Base, head: ModelRecord) -> ServedModel:
    """Returns a base as what a head that is not resident yet leans on."""
    return ServedModel(
        name=head.name,
        donor=None,
        position=head.position,
        created_at=head.created_at,
        fingerprint=base.fingerprint,
        max_model_len=base.text.config.max_position_embeddings,
        text=base.text,
    )


def _gone(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"The model {name!r} was deleted meanwhile.", param="model")


async def _leave_it(_record: ModelRecord) -> bool:
    return False
