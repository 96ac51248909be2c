"""The parts of a running server and how they hang together: built, started, drained, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry

from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.errors import NotReadyError
from server.bridge.client import EngineClient
from server.bridge.process import ENGINE_COMMAND
from server.bridge.supervisor import EngineState, EngineSupervisor, SupervisionLimits
from server.gateway.errors import REJECTION_REASONS
from server.gateway.gate import Gate
from server.gateway.hosts import is_loopback
from server.gateway.keys import KeyRing
from server.gateway.text_threads import TextThreads
from server.metrics.admission import AdmissionMetrics
from server.metrics.analysis import AnalysisSeries
from server.metrics.engine import render_engine
from server.metrics.evictions import EvictionMetrics
from server.metrics.exposition import Exposition
from server.metrics.fleet import FleetSeries
from server.metrics.serving import ServingMetrics
from server.metrics.sharing import SharingSeries
from server.metrics.view import View
from server.onboarding.admission import Admission
from server.onboarding.bases import Bases
from server.onboarding.deltas import Deltas
from server.onboarding.encoder import ENCODE_COMMAND, Encoder
from server.onboarding.hub.hub import Hub
from server.onboarding.imports import Imports
from server.onboarding.onboarder import Onboarder
from server.onboarding.planner import Planner
from server.onboarding.pricing import Pricing
from server.onboarding.replays import Replays
from server.onboarding.request import OnboardRequest
from server.onboarding.restorer import Restorer
from server.onboarding.returning import Returning
from server.onboarding.roster import Roster
from server.onboarding.scanner import SCAN_COMMAND, Scanner
from server.onboarding.sources import Sources
from server.onboarding.timing import STAGES
from server.onboarding.tuner import TUNE_COMMAND, Tuner
from server.onboarding.twin_rows import TwinRows
from server.onboarding.twins import Twins
from server.registry.health import watch
from server.registry.lock import StateLock
from server.registry.records import ModelRecord, ModelState
from server.registry.store import Registry
from server.rendering.templates import Templates
from server.residency.catalog import Catalog
from server.residency.evictions import Evictions
from server.residency.keep_alive import KeepAlive
from server.residency.on_demand import OnDemand
from server.residency.room import Room
from server.settings import Settings
from server.studies.files import Files
from server.studies.studies import Studies, Timing
from server.studies.worker import STUDY_COMMAND, StudyWorker
from server.tracing.writer import SpanWriter, open_writer

logger = logging.getLogger(__name__)

_LAST_SPANS_S = 5.0  # what a collector gets at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything a route may use."""

    settings: Settings
    lock: StateLock
    registry: Registry
    catalog: Catalog
    roster: Roster
    onboarder: Onboarder
    evictions: Evictions
    room: Room
    on_demand: OnDemand
    twin_rows: TwinRows
    keep_alive: KeepAlive
    engine: EngineSupervisor
    metrics: ServingMetrics
    exposition: Exposition
    gate: Gate
    keys: KeyRing
    replays: Replays
    studies: Studies
    templates: Templates
    text_threads: TextThreads
    spans: SpanWriter | None  # None: nobody wants them
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, startup: Sequence[OnboardRequest]) -> None:
        """Starts the engine and the jobs; returns at once, models come behind it."""
        self.templates.start()
        await self.onboarder.open(startup)
        onboarder = self.onboarder
        for work in (
            self.engine.run(),
            onboarder.run(),
            onboarder.flush(),
            self.keep_alive.run(),
            self.keys.follow(),
            self.studies.run(),
            watch(self.registry),
        ):
            self.tasks.append(asyncio.ensure_future(work))

    async def stop(self) -> None:
        """Stops jobs and engine. Interrupted jobs are finished by the next start."""
        for task in reversed(self.tasks):
            task.cancel()
        # Together: what waits for the engine ends with it.
        parts = (self.on_demand.stop(), self.evictions.stop(), self.templates.close())
        await asyncio.gather(*self.tasks, *parts, return_exceptions=True)
        self.text_threads.close()
        self.exposition.close()
        with contextlib.suppress(OSError):
            await self.onboarder.flush_once()
        if self.spans is not None:
            await self.spans.close(within_s=_LAST_SPANS_S)
        self.registry.close()
        self.lock.release()

    def shown(self, record: ModelRecord) -> ModelRecord:
        """Returns a model as clients see it now.

        One that is coming back is not ready, and one that is leaving as good as unloaded; the
        context length is that of today's settings.
        """
        served = self.catalog.get(record.name)
        if served is not None:
            return replace(record, max_model_len=served.max_model_len)
        if self.evictions.is_leaving(record.name):
            return replace(record, state=ModelState.UNLOADED)
        if record.state is ModelState.READY:
            return replace(record, state=ModelState.ONBOARDING)
        return record

    def engine_or_none(self) -> EngineClient | None:
        """Returns the engine, or None while there is none."""
        try:
            return self.engine.client
        except NotReadyError:
            return None

    async def scrape(self) -> bytes:
        """Returns every metric as Prometheus reads it."""
        # Looked at here, where all of it is written.
        return await self.exposition.scrape(self._view())

    def _view(self) -> View:
        return View(
            models=[self.shown(record) for record in self.roster.models()],
            twins=self.twin_rows.owners(),
            configs={served.name: served.text.config for served in self.catalog.models()},
            snapshot=self.engine.snapshot,
            engine_up=self.engine.state is EngineState.RUNNING,
            engine_restarts=max(0, self.engine.num_starts - 1),
            studies=self.studies.finished(),
            study_time=self.studies.spent,
        )

    def why_not_ready(self) -> str | None:
        """Returns what keeps the server from being ready, or None if it is."""
        if self.gate.draining:
            return "the server is shutting down"
        if self.engine.state is not EngineState.RUNNING:
            return f"the engine is {self.engine.state.value}"
        if self.onboarder.startup_failures() is None:
            return "start-up models are on their way"
        seen = (self.shown(record).state for record in self.roster.models())
        if not any(state in (ModelState.READY, ModelState.UNLOADED) for state in seen):
            return "no model can be served"
        return None

    def why_degraded(self) -> str | None:
        """Returns what a server that is ready cannot do, or None if it can do everything."""
        return "the registry cannot be written" if self.registry.is_failing else None


def build_services(
    settings: Settings,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    scan_command: Sequence[str] = SCAN_COMMAND,
    tune_command: Sequence[str] = TUNE_COMMAND,
    encode_command: Sequence[str] = ENCODE_COMMAND,
    study_command: Sequence[str] = STUDY_COMMAND,
    limits: SupervisionLimits | None = None,
) -> Services:
    """Builds the parts; nothing runs yet. The registry is opened. Needs a running event loop."""
    spans = open_writer(settings.telemetry)  # which may want what is not installed
    lock = StateLock(settings.state_directory())
    registry, catalog = Registry.open(settings.registry_url()), Catalog()
    collectors = CollectorRegistry()
    metrics = ServingMetrics(collectors, rejection_reasons=REJECTION_REASONS)

    def busy() -> bool:
        snapshot = supervisor.snapshot
        return snapshot is not None and any(load.running for load in snapshot.load.values())

    async def loaded_engine() -> EngineClient:
        return await restorer.engine()

    engine_config = settings.engine.to_engine_config()
    roster = Roster(registry=registry, metrics=metrics)
    rows = TwinRows(roster, catalog)  # what is resident may be a twin
    evictions = Evictions(
        catalog=catalog,
        rows=rows,
        engine=lambda: services.engine.client,
        metrics=EvictionMetrics(collectors),
    )
    room = Room(
        catalog=catalog,
        rows=rows,
        engine=lambda: services.engine.client,
        evictions=evictions,
        kv_bytes=lambda config: kv_cache_bytes(config, engine_config),
    )
    tuner = Tuner(
        engine=loaded_engine,
        room=room,
        device=settings.engine.device,
        busy=busy,
        command=tune_command,
    )
    on_host = settings.engine.device == "cpu"  # whose memory is then the encoder's, too
    encoder = Encoder(
        encode_command,
        busy=busy,
        room=room if on_host else None,
    )
    deltas = Deltas(settings.deltas_directory(), encoder)
    admission = Admission(
        catalog=catalog,
        rows=rows,
        room=room,
        deltas=deltas,
        engine=lambda: services.engine.client,
        engine_config=engine_config,
        max_model_len=settings.engine.max_model_len,
    )
    planner = Planner(
        registry=registry,
        scanner=Scanner(scan_command, device=settings.engine.device, busy=busy),
        pricing=Pricing(
            registry=registry,
            tuner=tuner,
            calibration=settings.sharing.calibration,
            precision=engine_config.served_precision,
        ),
        imports=Imports(encoder, deltas),
        snapshot=admission.snapshot,
    )
    sources = Sources(_roots(settings), Hub(settings.hub_directory(), settings.hub))
    bases = Bases(registry=registry, planner=planner, sources=sources)
    returning = Returning(
        roster=roster,
        catalog=catalog,
        planner=planner,
        admission=admission,
        bases=bases,
        sources=sources,
    )
    restorer = Restorer(roster=roster, catalog=catalog, admission=admission, returning=returning)
    twins = Twins(
        rows=rows,
        roster=roster,
        catalog=catalog,
        planner=planner,
        admission=admission,
        returning=returning,
    )
    on_demand = OnDemand(
        catalog=catalog,
        rows=rows,
        bring_back=twins.bring_back,
        close_one=room.close_one,
        engines=restorer,
        max_waiting=settings.models.load_queue,
        timeout_s=settings.models.load_timeout_s,
    )
    onboarder = Onboarder(
        roster=roster,
        catalog=catalog,
        admission=admission,
        restorer=restorer,
        evictions=evictions,
        twins=twins,
        metrics=AdmissionMetrics(collectors, stages=STAGES),
        queue_limit=settings.models.onboarding_queue,
    )
    supervisor = EngineSupervisor(
        engine_config,
        on_running=restorer.restore,
        on_down=restorer.engine_down,
        command=engine_command,
        limits=limits,
    )
    gate = Gate(
        settings.http.max_inflight,
        max_waiting_tokens=settings.http.max_waiting_prompt_tokens,
    )
    studies = Studies(
        roster=roster,
        registry=registry,
        files=Files(roster=roster, catalog=catalog, sources=sources, planner=planner, bases=bases),
        worker=StudyWorker(study_command, busy=busy),
        closing=gate.closing,
        is_enabled=settings.analysis.enabled,
        timing=Timing(settle_s=settings.analysis.settle_s),
    )
    services = Services(
        settings=settings,
        lock=lock,
        registry=registry,
        catalog=catalog,
        roster=roster,
        onboarder=onboarder,
        evictions=evictions,
        room=room,
        on_demand=on_demand,
        twin_rows=rows,
        keep_alive=KeepAlive(
            catalog=catalog,
            rows=rows,
            evictions=evictions,
            default_s=settings.models.keep_alive,
        ),
        engine=supervisor,
        metrics=metrics,
        exposition=Exposition(
            collectors,
            (
                render_engine,
                FleetSeries().render,
                metrics.render,
                SharingSeries(registry).render,
                AnalysisSeries().render,
            ),
            version=version("linker-llm"),
        ),
        gate=gate,
        keys=KeyRing(
            registry.api_keys,
            no_auth=settings.http.no_auth,
            is_private=is_loopback(settings.http.host),
            on_change=gate.quotas.keep,
        ),
        replays=Replays(registry),
        studies=studies,
        templates=Templates(),
        text_threads=TextThreads(),
        spans=spans,
    )
    catalog.on_moved = rows.note_moved
    return services


def _roots(settings: Settings) -> list[Path]:
    root = () if settings.models.root is None else (settings.models.root,)
    return [*root, *(model.path for model in settings.models.serve if not model.is_on_hub)]
