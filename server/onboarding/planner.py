"""Decides what of a checkpoint is stored: fingerprint, scan, price where the policy asks, plan.

Each step is skipped where its result is known: in memory, or in the registry by contents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from linker_core.engine.messages import Snapshot
from linker_core.sharing.plan import Policy, SharePlan
from linker_core.sharing.report import ScanReport
from linker_core.tuning.request import FIT_POINTS, TuneGoal
from linker_core.tuning.result import TuneResult
from server.onboarding.adapters import AdapterSide, Source
from server.onboarding.comparisons import Comparisons
from server.onboarding.fingerprints import Fingerprints
from server.onboarding.imports import Imports, adopted_plan
from server.onboarding.pairs import Pair, files_changed, make_donor_plan
from server.onboarding.planning import (
    check_budget,
    check_donor_size,
    tuning_goal,
    untuned_plan,
)
from server.onboarding.pricing import Pricing
from server.onboarding.processes import OnStageProgress
from server.onboarding.request import OnboardRequest
from server.onboarding.scanner import Scanner
from server.onboarding.stored import restored
from server.onboarding.timing import Stopwatch
from server.registry.records import JobStage, Json
from server.registry.store import Registry
from server.residency.catalog import ServedModel, TextSide

OnStage = Callable[[JobStage, int, int], None]  # stage, bytes done, bytes in all
_STAGES = {
    "hashing": JobStage.VALIDATING,
    "scanning": JobStage.SCANNING,
    "tuning": JobStage.TUNING,
    "verifying": JobStage.VALIDATING,
    "encoding": JobStage.LOADING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A validated source with its plan."""

    text: TextSide
    fingerprint: str
    donor: ServedModel | None
    plan: SharePlan
    free_bytes: int | None  # of the device before a tuner took its share; None: no engine
    report: Json | None = None  # None: a donor is compared with nothing
    tuned: TuneResult | None = None  # None: no tuner was needed


class Planner:
    """Plans checkpoints.

    Scans and tuners use every core and memory of their own: whoever plans holds `turn`, from the
    choice of the donor until what was planned is loaded or answered. A dry run that needs no tuner
    and loads nothing would wait for minutes of work that it has no part in: it holds `aside`.

    Args:
        registry: Keeps the scans.
        scanner: Starts scan workers.
        pricing: Finds prices.
        imports: Knows sources that bring their own plan.
        snapshot: Returns the engine's last report, or None.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        scanner: Scanner,
        pricing: Pricing,
        imports: Imports,
        snapshot: Callable[[], Snapshot | None],
    ) -> None:
        self._registry = registry
        self._scanner = scanner
        self._pricing = pricing
        self._imports = imports
        self._snapshot = snapshot
        self._fingerprints = Fingerprints(scanner)
        self.comparisons = Comparisons(
            registry=registry, scanner=scanner, fingerprints=self._fingerprints
        )
        self.turn = asyncio.Lock()
        self.aside = asyncio.Lock()

    async def plan(
        self,
        request: OnboardRequest,
        source: Source,
        donor: ServedModel | None,
        *,
        watch: Stopwatch,
        on_stage: OnStage,
        hold_budget: bool = True,
    ) -> Planned:
        """Decides what of a validated source will be stored.

        The caller holds `turn`, or `aside` where `may_be_measured` says no.

        Args:
            request: What is asked for.
            source: The validated side of a checkpoint or a delta folder, or an adapter.
            donor: None makes it a donor.
            watch: Takes the seconds of each stage.
            on_stage: Hears of each stage's progress.
            hold_budget: Whether a price beyond the budget is an error.

        Raises:
            LinkerError: Any reason why this model cannot be onboarded.
        """
        assert self.turn.locked() or self.aside.locked()
        try:
            if isinstance(source, AdapterSide) or source.delta is not None:
                planned = await self._adopt(source, donor, watch, as_progress(on_stage))
            else:
                planned = await self._plan(request, source, donor, watch, as_progress(on_stage))
        finally:
            watch.stop()
        if hold_budget:
            check_budget(planned.plan)
        return planned

    async def is_scanned(self, donor_fingerprint: str, fingerprint: str) -> bool:
        """Whether a variant and what it is compared with need no scan to be planned."""
        stored = await asyncio.to_thread(self._registry.scan, donor_fingerprint, fingerprint)
        return restored(ScanReport.from_json, stored) is not None

    async def lossless(self, text: TextSide, fingerprint: str, donor: ServedModel) -> SharePlan:
        """Returns what is stored of a checkpoint so that none of its weights changes.

        The caller holds `turn` unless the two are scanned.

        Args:
            text: Its validated side.
            fingerprint: Its own.
            donor: What it is compared with.

        Raises:
            LinkerError: The two cannot be scanned.
        """
        report = await self._report(text, fingerprint, donor, Stopwatch(), ignore_progress)
        pair = Pair(text=text, fingerprint=fingerprint, donor=donor, report=report)
        request = OnboardRequest(name="", source="", policy=Policy.EXACT.value)
        return await asyncio.to_thread(pair.draft, request)

    async def spread(
        self, text: TextSide, donor: ServedModel, *, watch: Stopwatch, on_stage: OnStage
    ) -> TuneResult:
        """Returns plans of a checkpoint from few bytes to many, priced. The caller holds `turn`.

        Raises:
            LinkerError: Any reason why they cannot be priced.
        """
        assert self.turn.locked()
        on_progress = as_progress(on_stage)
        try:
            fingerprint = await self._fingerprints.find(text, watch=watch, on_progress=on_progress)
            report = await self._report(text, fingerprint, donor, watch, on_progress)
            pair = Pair(text=text, fingerprint=fingerprint, donor=donor, report=report)
            goal = TuneGoal(num_points=FIT_POINTS)
            return await self._pricing.find(pair, goal, watch=watch, on_progress=on_progress)
        finally:
            watch.stop()

    async def text_side(self, source: Source, donor: ServedModel | None) -> TextSide:
        """Returns the text side of a source that was planned before; see `Imports.text_side`."""
        if isinstance(source, TextSide):
            return source
        assert donor is not None
        return await self._imports.text_side(
            source, donor, watch=Stopwatch(), on_progress=ignore_progress
        )

    async def fingerprint(self, source: Source, donor: ServedModel | None) -> str:
        """Returns the digest of a model's files, which are read once in this process's life.

        Args:
            source: Their validated side.
            donor: The model's, if it has one.

        Raises:
            BadCheckpointError: The files cannot be read; see also `Imports.fingerprint`.
        """
        if isinstance(source, AdapterSide) or source.delta is not None:
            assert donor is not None
            return await self._imports.fingerprint(source, donor, on_progress=ignore_progress)
        return await self._fingerprints.find(source, watch=Stopwatch(), on_progress=ignore_progress)

    def price_holds(self, plan: Json | None) -> bool:
        """Whether a stored plan's price, if it can be read, was measured as it would be now.

        What an exporter claims was never measured here and cannot be measured again.
        """
        known = restored(SharePlan.from_json, plan)
        return known is None or known.policy is Policy.DELTA or self._pricing.holds(known)

    async def _plan(
        self,
        request: OnboardRequest,
        text: TextSide,
        donor: ServedModel | None,
        watch: Stopwatch,
        follow: OnStageProgress,
    ) -> Planned:
        if request.policy in (Policy.DELTA, Policy.ADAPTER):
            raise files_changed()  # accepted as something else
        free_bytes = self._free_bytes()
        # A donor is compared with nothing, so its weights are checked for NaN in this pass.
        fingerprint = await self._fingerprints.find(
            text, finite=donor is None, watch=watch, on_progress=follow
        )
        if donor is None:
            plan = await asyncio.to_thread(make_donor_plan, text, fingerprint)
            check_donor_size(request, plan)
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

    async def _adopt(
        self,
        source: Source,
        donor: ServedModel | None,
        watch: Stopwatch,
        follow: OnStageProgress,
    ) -> Planned:
        """Takes the plan that a source brings."""
        assert donor is not None
        free_bytes = self._free_bytes()
        watch.enter("hash")
        digest = await self._imports.fingerprint(source, donor, on_progress=follow)
        watch.stop()
        text = await self._imports.text_side(source, donor, watch=watch, on_progress=follow)
        return Planned(
            text=text,
            fingerprint=digest,
            donor=donor,
            plan=adopted_plan(source, text, digest),
            free_bytes=free_bytes,
        )

    def _free_bytes(self) -> int | None:
        snapshot = self._snapshot()
        return None if snapshot is None else snapshot.unreserved_bytes

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


def as_progress(on_stage: OnStage) -> OnStageProgress:
    """Returns what hears a worker's progress and tells it as a job's stages."""

    def on_progress(stage: str, done_bytes: int, total_bytes: int) -> None:
        on_stage(_STAGES[stage], done_bytes, total_bytes)

    return on_progress


def ignore_progress(_stage: str, _done_bytes: int, _total_bytes: int) -> None:
    """A restored model has no job to report to."""
