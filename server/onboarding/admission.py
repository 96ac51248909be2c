"""The steps that take one checkpoint from its source into the engine. Each may be repeated.

validate -> fingerprint -> scan against the donor (or find the stored scan) -> plan, with a tuner
(or its stored result) where the policy asks for a price -> load.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.engine.messages import LoadModel, Snapshot
from linker_core.errors import EngineFailureError, NotReadyError
from linker_core.sharing.plan import Policy, SharePlan
from linker_core.sharing.report import ScanReport
from linker_core.tuning.result import TuneResult
from linker_core.weights.architecture import ModelConfig
from server.bridge.client import EngineClient, OnProgress
from server.onboarding.catalog import Catalog, ServedModel, TextSide
from server.onboarding.fingerprints import Fingerprints
from server.onboarding.pairs import Pair, files_changed, make_donor_plan
from server.onboarding.planning import tuning_goal, untuned_plan
from server.onboarding.pricing import Pricing
from server.onboarding.processes import OnStageProgress
from server.onboarding.request import OnboardRequest
from server.onboarding.scanner import Scanner
from server.onboarding.stored import restored
from server.onboarding.timing import Stopwatch
from server.registry.records import JobStage, Json, ModelRecord
from server.registry.store import Registry

OnStage = Callable[[JobStage, int, int], None]  # stage, bytes done, bytes in all
_STAGES = {
    "hashing": JobStage.VALIDATING,
    "scanning": JobStage.SCANNING,
    "tuning": JobStage.TUNING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A validated checkpoint with its plan."""

    text: TextSide
    fingerprint: str
    donor: ServedModel | None
    plan: SharePlan
    free_bytes: int | None  # of the device before a tuner took its share; None: no engine
    report: Json | None = None  # None: a donor is compared with nothing
    tuned: TuneResult | None = None  # None: no tuner was needed


class Arrival(NamedTuple):
    """A model that became resident, and what that took in the engine."""

    model: ServedModel
    alias_seconds: float
    move_seconds: float


class Admission:
    """Plans checkpoints and loads them.

    Args:
        registry: Keeps the scans.
        catalog: Where donors are found.
        scanner: Starts scan workers.
        pricing: Finds prices.
        engine: Returns the engine, or raises `NotReadyError`.
        engine_config: Says what a family's KV cache takes.
        max_model_len: Asked of the engine for every model; None leaves it to the model.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        catalog: Catalog,
        scanner: Scanner,
        pricing: Pricing,
        engine: Callable[[], EngineClient],
        engine_config: EngineConfig,
        max_model_len: int | None,
    ) -> None:
        self._registry = registry
        self._catalog = catalog
        self._scanner = scanner
        self._pricing = pricing
        self._engine = engine
        self._engine_config = engine_config
        self._max_model_len = max_model_len
        self._fingerprints = Fingerprints(scanner)
        # One plan is made at a time: scans and tuners use every core and memory of their own.
        self._turn = asyncio.Lock()

    async def plan(
        self,
        request: OnboardRequest,
        text: TextSide,
        donor: ServedModel | None,
        *,
        watch: Stopwatch,
        on_stage: OnStage,
    ) -> Planned:
        """Decides what of a validated checkpoint will be stored; jobs and dry runs take turns.

        Raises:
            LinkerError: Any reason why this model cannot be onboarded.
        """
        async with self._turn:
            try:
                return await self._plan(request, text, donor, watch, _follow(on_stage))
            finally:
                watch.stop()

    async def fingerprint(self, text: TextSide) -> str:
        """Returns the digest of a checkpoint, hashing files once in this process's life.

        Raises:
            BadCheckpointError: The files cannot be read.
        """
        return await self._fingerprints.find(text, watch=Stopwatch(), on_progress=_ignore_progress)

    async def load(
        self,
        record: ModelRecord,
        text: TextSide,
        plan: SharePlan,
        *,
        on_progress: OnProgress | None = None,
    ) -> Arrival:
        """Makes a planned model resident; `record` carries name, donor and fingerprint.

        Raises:
            NotReadyError: Its donor is not resident, or the engine is not there.
            LinkerError: The engine could not load it.
        """
        if record.donor is not None and self._catalog.get(record.donor) is None:
            raise NotReadyError(f"Its donor {record.donor!r} is not resident.")
        assert record.fingerprint is not None
        command = LoadModel(
            model=record.name,
            path=str(text.path),
            identity=text.identity,
            config=text.config,
            plan=plan,
            donor=record.donor,
            max_model_len=self._max_model_len,
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
        self, request: OnboardRequest, text: TextSide, donor: ServedModel | None
    ) -> int:
        """Returns what a model takes on the device even if it can share all that may be shared."""
        if donor is None:
            return text.checkpoint_bytes + self.kv_bytes(text.config)
        # BS Eq. 3 shares blocks alone; under other policies the rest may be the donor's too.
        return text.outside_blocks_bytes if request.policy == Policy.THRESHOLDS else 0

    def kv_bytes(self, config: ModelConfig) -> int:
        """Returns what the KV cache of a new family takes."""
        return kv_cache_bytes(config, self._engine_config)

    async def _plan(
        self,
        request: OnboardRequest,
        text: TextSide,
        donor: ServedModel | None,
        watch: Stopwatch,
        follow: OnStageProgress,
    ) -> Planned:
        snapshot = self.snapshot()
        free_bytes = None if snapshot is None else snapshot.device_free_bytes
        # A donor is compared with nothing, so its weights are checked for NaN in this pass.
        fingerprint = await self._fingerprints.find(
            text, finite=donor is None, watch=watch, on_progress=follow
        )
        if donor is None:
            plan = await asyncio.to_thread(make_donor_plan, text, fingerprint)
            return Planned(
                text=text, fingerprint=fingerprint, donor=None, plan=plan, free_bytes=free_bytes
            )
        report = await self._report(text, fingerprint, donor, watch, follow)
        pair = Pair(text=text, fingerprint=fingerprint, donor=donor, report=report)
        plan, tuned = await self._priced(request, pair, watch, follow)
        return Planned(
            text=text,
            fingerprint=fingerprint,
            donor=donor,
            plan=plan,
            free_bytes=free_bytes,
            report=report,
            tuned=tuned,
        )

    async def _report(
        self,
        text: TextSide,
        fingerprint: str,
        donor: ServedModel,
        watch: Stopwatch,
        follow: OnStageProgress,
    ) -> Json:
        """Returns the scan of a variant against its donor, from the registry if it is there."""
        stored = await asyncio.to_thread(self._registry.scan, donor.fingerprint, fingerprint)
        if stored is not None and restored(ScanReport.from_json, stored) is not None:
            return stored
        watch.enter("scan")
        result = await self._scanner.run(
            text.path, donor=donor.text.path, hashed=False, on_progress=follow
        )
        watch.stop()
        # Both fingerprints were made of files of these identities.
        if (result.identity, result.donor_identity) != (text.identity, donor.text.identity):
            raise files_changed()
        assert result.report is not None
        self._fingerprints.note_finite(text)
        await asyncio.to_thread(
            self._registry.save_scan, donor.fingerprint, fingerprint, result.report
        )
        return result.report

    async def _priced(
        self, request: OnboardRequest, pair: Pair, watch: Stopwatch, follow: OnStageProgress
    ) -> tuple[SharePlan, TuneResult | None]:
        """Returns the plan, with its price where the policy asks for one, and what was measured."""
        draft = await asyncio.to_thread(pair.draft, request)
        goal = tuning_goal(request, ScanReport.from_json(pair.report), draft)
        if goal is None:
            return untuned_plan(request, draft), None
        tuned = await self._pricing.find(pair, goal, watch=watch, on_progress=follow)
        return await asyncio.to_thread(pair.tuned, request, tuned), tuned


def _follow(on_stage: OnStage) -> OnStageProgress:
    def follow(stage: str, done_bytes: int, total_bytes: int) -> None:
        on_stage(_STAGES[stage], done_bytes, total_bytes)

    return follow


def _ignore_progress(_stage: str, _done_bytes: int, _total_bytes: int) -> None:
    """A restored model has no job to report to."""
