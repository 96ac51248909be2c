"""Takes planned models into the engine and out of it. Each step may be repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.engine.messages import BaseFiles, LoadModel, Snapshot
from linker_core.errors import EngineFailureError, NotReadyError
from linker_core.sharing.plan import Policy, SharePlan
from linker_core.weights.architecture import ModelConfig
from server.bridge.client import EngineClient, OnProgress
from server.onboarding.adapters import AdapterSide, Source
from server.onboarding.deltas import Deltas, Weights
from server.onboarding.request import OnboardRequest
from server.registry.records import ModelRecord
from server.residency.catalog import Base, Catalog, ServedModel, TextSide


class Arrival(NamedTuple):
    """A model that became resident, and what that took in the engine."""

    model: ServedModel
    alias_seconds: float
    move_seconds: float


class Admission:
    """Loads planned models.

    Args:
        catalog: Where donors are found.
        deltas: Has what models with residuals are loaded from.
        engine: Returns the engine, or raises `NotReadyError`.
        engine_config: Says what a family's KV cache takes.
        max_model_len: Asked of the engine for every model; None leaves it to the model.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        deltas: Deltas,
        engine: Callable[[], EngineClient],
        engine_config: EngineConfig,
        max_model_len: int | None,
    ) -> None:
        self.deltas = deltas
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
        on_progress: OnProgress | None = None,
    ) -> Arrival:
        """Makes a planned model resident; `record` carries name, donor and fingerprint.

        Args:
            record: The model.
            text: Its validated side.
            plan: What is stored of it.
            weights: Where the engine reads that.
            replaces: Whether the model is resident with another plan, which serves until then.
            base: What the plan was made against, of a model without a donor that is none itself.
            on_progress: Hears of bytes moved and to be moved.

        Raises:
            NotReadyError: Its donor is not resident, or the engine is not there.
            LinkerError: The engine could not load it.
        """
        lender = base
        if record.donor is not None:
            donor = self._catalog.get(record.donor)
            if donor is None:
                raise NotReadyError(f"Its donor {record.donor!r} is not resident.")
            lender = Base.of(donor.lender)
        assert record.fingerprint is not None
        command = LoadModel(
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
        loaded = await self._engine().load(command, on_progress=on_progress)
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
        return Arrival(model, loaded.alias_seconds, loaded.move_seconds)

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
        if isinstance(source, AdapterSide):
            return 0  # its factors are small, and may be of another type
        if donor is None:
            return source.checkpoint_bytes + self.kv_bytes(source.config)
        if source.delta is not None:
            return source.delta.unique_bytes
        # BS Eq. 3 shares blocks alone; under other policies the rest may be the donor's too.
        return source.outside_blocks_bytes if request.policy == Policy.THRESHOLDS else 0

    def kv_bytes(self, config: ModelConfig) -> int:
        """Returns what the KV cache of a new family takes."""
        return kv_cache_bytes(config, self._engine_config)


def _files(text: TextSide) -> BaseFiles:
    return BaseFiles(path=str(text.path), identity=text.identity, config=text.config)
