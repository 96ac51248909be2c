"""How long admissions take, stage by stage, and how they end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

_BUCKETS_S = (
    0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0,
)  # fmt: skip
OUTCOMES = ("succeeded", "failed", "cancelled")


class AdmissionMetrics:
    """What onboarding costs.

    Args:
        registry: Where the metrics are exposed.
        stages: Every stage of an admission.
    """

    def __init__(self, registry: CollectorRegistry, *, stages: Iterable[str]) -> None:
        self._seconds = Histogram(
            "linker_admission_seconds",
            "What an admission that succeeded spent in a stage; skipped stages are left out.",
            ["stage"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._admissions = Counter(
            "linker_admissions", "Onboarding jobs by how they ended.", ["outcome"],
            registry=registry,
        )  # fmt: skip
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
