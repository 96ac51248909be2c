"""The steps that take one checkpoint from its source into the engine. Each may be repeated.

validate -> fingerprint -> scan against the donor (or find the stored scan) -> plan -> load.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.engine.messages import LoadModel, Snapshot
from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    NotReadyError,
)
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan, plan_donor, plan_variant
from linker_core.sharing.report import ScanReport
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from server.bridge.client import EngineClient, OnProgress
from server.onboarding.catalog import Catalog, ServedModel, TextSide
from server.onboarding.request import OnboardRequest
from server.onboarding.scanner import Scanner
from server.registry.records import JobStage, Json, ModelRecord
from server.registry.store import Registry

OnStage = Callable[[JobStage, int, int], None]  # stage, bytes done, bytes in all
_STAGES = {"hashing": JobStage.VALIDATING, "scanning": JobStage.SCANNING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A validated checkpoint with its plan."""

    text: TextSide
    fingerprint: str
    donor: ServedModel | None
    plan: SharePlan


class Admission:
    """Plans checkpoints and loads them.

    Args:
        registry: Keeps the scans.
        catalog: Where donors are found.
        scanner: Starts scan workers.
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
        engine: Callable[[], EngineClient],
        engine_config: EngineConfig,
        max_model_len: int | None,
    ) -> None:
        self._registry = registry
        self._catalog = catalog
        self._scanner = scanner
        self._engine = engine
        self._engine_config = engine_config
        self._max_model_len = max_model_len
        self._fingerprints: dict[tuple[object, ModelConfig], str] = {}

    async def plan(
        self,
        request: OnboardRequest,
        text: TextSide,
        donor: ServedModel | None,
        on_stage: OnStage,
    ) -> Planned:
        """Decides what of a validated checkpoint will be stored.

        Raises:
            LinkerError: Any reason why this model cannot be onboarded.
        """
        # A donor is compared with nothing, so its weights are checked for NaN in this pass.
        fingerprint = await self._hash(text, scanned=donor is None, on_stage=on_stage)
        report = None
        if donor is not None:
            report = await self._report(text, fingerprint, donor, on_stage)
        plan = await asyncio.to_thread(_make_plan, request, text, fingerprint, donor, report)
        return Planned(text=text, fingerprint=fingerprint, donor=donor, plan=plan)

    async def fingerprint(self, text: TextSide) -> str:
        """Returns the digest of a checkpoint, hashing files once in this process's life.

        Raises:
            BadCheckpointError: The files cannot be read.
        """
        key = (text.identity, text.config)
        known = self._fingerprints.get(key)
        return known or await self._hash(text, scanned=False, on_stage=_ignore_stage)

    async def load(
        self,
        record: ModelRecord,
        text: TextSide,
        plan: SharePlan,
        *,
        on_progress: OnProgress | None = None,
    ) -> ServedModel:
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
        return ServedModel(
            name=record.name,
            donor=record.donor,
            position=record.position,
            created_at=record.created_at,
            fingerprint=record.fingerprint,
            max_model_len=loaded.max_model_len,
            text=text,
        )

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
            return text.checkpoint_bytes + kv_cache_bytes(text.config, self._engine_config)
        # BS Eq. 3 shares blocks alone; under `exact` the rest may be the donor's too.
        return text.outside_blocks_bytes if request.policy == Policy.THRESHOLDS else 0

    async def _hash(self, text: TextSide, *, scanned: bool, on_stage: OnStage) -> str:
        result = await self._scanner.run(text.path, scanned=scanned, on_progress=_follow(on_stage))
        if result.identity != text.identity:
            raise _changed()
        assert result.fingerprint is not None
        self._fingerprints[text.identity, text.config] = result.fingerprint
        return result.fingerprint

    async def _report(
        self, text: TextSide, fingerprint: str, donor: ServedModel, on_stage: OnStage
    ) -> Json:
        """Returns the scan of a variant against its donor, from the registry if it is there."""
        stored = await asyncio.to_thread(self._registry.scan, donor.fingerprint, fingerprint)
        if stored is not None:
            return stored
        result = await self._scanner.run(
            text.path, donor=donor.text.path, hashed=False, on_progress=_follow(on_stage)
        )
        # Both fingerprints were made of files of these identities.
        if (result.identity, result.donor_identity) != (text.identity, donor.text.identity):
            raise _changed()
        assert result.report is not None
        await asyncio.to_thread(
            self._registry.save_scan, donor.fingerprint, fingerprint, result.report
        )
        return result.report


def _make_plan(
    request: OnboardRequest,
    text: TextSide,
    fingerprint: str,
    donor: ServedModel | None,
    report: Json | None,
) -> SharePlan:
    with Checkpoint.open(text.path) as variant:
        if variant.identity != text.identity:
            raise BadCheckpointError(
                "The model's files were replaced while it was being onboarded."
            )
        if donor is None:
            return plan_donor(variant, fingerprint=fingerprint)
        assert report is not None
        with Checkpoint.open(donor.text.path) as lender:
            return plan_variant(
                ScanReport.from_json(report),
                lender,
                variant,
                policy=Policy(request.policy),
                fingerprints=Fingerprints(donor.fingerprint, fingerprint),
                tau_cos=request.tau_cos,
                tau_frob=request.tau_frob,
                tier=request.tier,
            )


def _changed() -> BadCheckpointError:
    return BadCheckpointError(
        "A file of the model or of its donor changed while it was being read. "
        "Restore the files and retry."
    )


def _follow(on_stage: OnStage) -> Callable[[str, int, int], None]:
    def follow(stage: str, done_bytes: int, total_bytes: int) -> None:
        on_stage(_STAGES[stage], done_bytes, total_bytes)

    return follow


def _ignore_stage(_stage: JobStage, _done_bytes: int, _total_bytes: int) -> None:
    """A restored model has no job to report to."""
