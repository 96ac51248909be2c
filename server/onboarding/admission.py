"""Takes planned models into the engine and out of it. Each step may be repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.engine.messages import BaseFiles, LoadModel, ModelLoaded, Snapshot
from linker_core.errors import EngineFailureError, NotReadyError
from linker_core.sharing.plan import SharePlan
from linker_core.weights.architecture import ModelConfig
from server.bridge.client import EngineClient, OnProgress
from server.onboarding.adapters import Source
from server.onboarding.deltas import Deltas, Weights
from server.onboarding.prediction import Needs, Prediction
from server.onboarding.request import OnboardRequest
from server.registry.records import ModelRecord
from server.residency.catalog import Base, Catalog, ServedModel, TextSide
from server.residency.room import Room
from server.residency.rows import Rows


class Arrival(NamedTuple):
    """A model that became resident, and what that took in the engine."""

    model: ServedModel
    alias_seconds: float
    move_seconds: float
    first_token_seconds: float


class Admission:
    """Loads planned models.

    Args:
        catalog: Where donors are found.
        rows: Have the plans of what is resident.
        room: Makes room for loads.
        deltas: Has what models with residuals are loaded from.
        engine: Returns the engine, or raises `NotReadyError`.
        engine_config: Says what a family's KV cache takes.
        max_model_len: Asked of the engine for every model; None leaves it to the model.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        rows: Rows,
        room: Room,
        deltas: Deltas,
        engine: Callable[[], EngineClient],
        engine_config: EngineConfig,
        max_model_len: int | None,
    ) -> None:
        self.deltas = deltas
        self.room = room
        self.prediction = Prediction(catalog=catalog, rows=rows, kv_bytes=self.kv_bytes)
        self._catalog = catalog
        self._engine = engine
        self._engine_config = engine_config
        self._max_model_len = max_model_len

    async def load(
        self,
        record: ModelRecord,
        text: TextSide,
        plan: SharePlan,
        weights: Weights,
        *,
        replaces: bool = False,
        base: Base | None = None,
        may_evict: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Arrival:
        """Makes a planned model resident; `record` carries name, donor and fingerprint.

        Idle models are evicted for it. Its donor stays meanwhile. One that cannot give a token is
        not resident, and one that it was to replace still is.

        Args:
            record: The model.
            text: Its validated side.
            plan: What is stored of it.
            weights: Where the engine reads that.
            replaces: Whether the model is resident with another plan, which serves until then.
            base: What the plan was made against, of a model without a donor that is none itself.
            may_evict: Whether idle models leave for it.
            on_progress: Hears of bytes moved and to be moved.

        Raises:
            NotReadyError: Its donor is not resident, or the engine is not there.
            InsufficientCapacityError: There is no room for it; see `Room.taking`.
            LinkerError: The engine could not load it.
        """
        assert record.fingerprint is not None
        with self._leased_donor(record.donor) as donor:
            lender = base if donor is None else Base.of(donor.lender)
            command = self._command(record, text, plan, weights, lender, replaces=replaces)
            keep = [record.name] if donor is None else [record.name, donor.name]

            async def load() -> ModelLoaded:
                engine = self._engine()
                loaded = await engine.load(command, on_progress=on_progress)
                if engine.closed.is_set():  # its models were closed already, this one would not be
                    raise EngineFailureError("The engine ended as it had loaded the model.")
                return loaded

            loaded = await self.room.fit(
                self._needs(command, lender).total,
                load,
                what=f"The model {record.name!r}",
                keep=frozenset(keep),
                may_evict=may_evict,
                founds=lender is None,
            )
        model = ServedModel(
            name=record.name,
            donor=record.donor,
            position=record.position,
            created_at=record.created_at,
            fingerprint=record.fingerprint,
            max_model_len=loaded.max_model_len,
            text=text,
            base=base,
        )
        return Arrival(model, loaded.alias_seconds, loaded.move_seconds, loaded.first_token_seconds)

    @contextlib.contextmanager
    def _leased_donor(self, donor: str | None) -> Iterator[ServedModel | None]:
        """Keeps a donor resident."""
        if donor is None:
            yield None
            return
        if self._catalog.get(donor) is None:
            raise NotReadyError(f"Its donor {donor!r} is not resident.")
        with self._catalog.lease(donor) as served:
            yield served

    def _command(
        self,
        record: ModelRecord,
        text: TextSide,
        plan: SharePlan,
        weights: Weights,
        lender: Base | None,
        *,
        replaces: bool,
    ) -> LoadModel:
        return LoadModel(
            model=record.name,
            path=str(weights.path),
            identity=weights.identity,
            config=text.config,
            plan=plan,
            donor=record.donor,
            max_model_len=self._max_model_len,
            replaces=replaces,
            base=None if lender is None else _files(lender.text),
        )

    def _needs(self, command: LoadModel, lender: Base | None) -> Needs:
        """Predicts a load.

        Args:
            command: The load.
            lender: What its plan was made against.
        """
        plan = command.plan
        if command.donor is not None:
            return self.prediction.of_variant(plan.rungs, plan.unique_bytes, command.donor)
        base = None if lender is None else lender.text.config
        return self.prediction.of_head(plan.rungs, plan.unique_bytes, command.config, base)

    async def unload(self, name: str) -> None:
        """Takes a model out of the engine, if there is one."""
        engine = self.engine_or_none()
        if engine is not None:
            with contextlib.suppress(EngineFailureError):
                await engine.unload(name)

    def engine_or_none(self) -> EngineClient | None:
        """Returns the engine, or None while there is none."""
        try:
            return self._engine()
        except NotReadyError:
            return None

    def snapshot(self) -> Snapshot | None:
        """Returns the engine's last report, or None while there is no engine."""
        engine = self.engine_or_none()
        return None if engine is None else engine.snapshot

    def least_bytes(
        self, request: OnboardRequest, source: Source, donor: ServedModel | None
    ) -> int:
        """Returns what a model takes on the device even if it can share all that may be shared."""
        name = None if donor is None else donor.name
        return self.prediction.at_least(source, request.policy, name)

    def kv_bytes(self, config: ModelConfig) -> int:
        """Returns what the KV cache of a new family takes."""
        return kv_cache_bytes(config, self._engine_config)


def _files(text: TextSide) -> BaseFiles:
    return BaseFiles(path=str(text.path), identity=text.identity, config=text.config)
