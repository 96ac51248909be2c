"""How long admissions take, stage by stage, and how they end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.metrics.families import FAMILIES

OUTCOMES = ("succeeded", "failed", "cancelled")


class AdmissionMetrics:
    """What onboarding costs.

    Args:
        registry: Where the metrics are exposed.
        stages: Every stage of an admission.
    """

    def __init__(self, registry: CollectorRegistry, *, stages: Iterable[str]) -> None:
        spent = FAMILIES["linker_admission_seconds"]
        self._seconds = Histogram(
            spent.name, spent.help, spent.labels, buckets=spent.buckets, registry=registry
        )
        ended = FAMILIES["linker_admissions_total"]
        self._admissions = Counter(ended.name, ended.help, ended.labels, registry=registry)
        for stage in stages:
            self._seconds.labels(stage)
        for outcome in OUTCOMES:
            self._admissions.labels(outcome)

    def succeeded(self, seconds: Mapping[str, float]) -> None:
        """Counts an admission and what it spent in the stages it went through."""
        self._admissions.labels("succeeded").inc()
        for stage, spent in seconds.items():
            self._seconds.labels(stage).observe(spent)

    def failed(self) -> None:
        """Counts a job that ended without a model."""
        self._admissions.labels("failed").inc()

    def cancelled(self) -> None:
        """Counts a job that was cancelled before its model was ready."""
        self._admissions.labels("cancelled").inc()
