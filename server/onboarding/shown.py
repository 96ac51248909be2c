"""The rows that are in memory: what everybody reads, and what watchers hear of. Event loop only.

Knows no SQL.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.metrics.serving import ServingMetrics
from server.onboarding.feed import Feed
from server.onboarding.rates import Rates
from server.registry.records import JobRecord, ModelRecord, Record


class Shown:
    """Models by name and jobs by id.

    Args:
        metrics: Told which models exist.

    Attributes:
        models: Every known model.
        jobs: Those that wait or run, or whose end is not stored yet.
        feed: Hears of every change.
    """

    def __init__(self, *, metrics: ServingMetrics) -> None:
        self.models: dict[str, ModelRecord] = {}
        self.jobs: dict[str, JobRecord] = {}
        self.feed = Feed()
        self._metrics = metrics
        self._rates = Rates()

    def show(self, *records: ModelRecord | JobRecord) -> None:
        """Shows records as they are from now on."""
        for record in records:
            if isinstance(record, ModelRecord):
                self.models[record.name] = record
                self._metrics.add_model(record.name)
                self.feed.note_model(record.name)
            else:
                self.jobs[record.id] = record
                self.feed.note_job(record)

    def note_progress(self, job: JobRecord) -> None:
        """Shows a job's progress."""
        self.jobs[job.id] = job
        self._rates.note(job)
        self.feed.note_job(job)

    def bytes_per_second(self, job: JobRecord) -> float | None:
        """Returns how fast a job comes on in its stage; None if nobody knows."""
        return self._rates.bytes_per_second(job)

    def remaining_s(self, job: JobRecord) -> float | None:
        """Returns what a job's stage still takes; None if nobody knows."""
        return self._rates.remaining_s(job)

    def drop(self, names: Iterable[str]) -> None:
        """Shows that models are no more."""
        for name in names:
            del self.models[name]
            self._metrics.remove_model(name)
            self.feed.note_model(name)

    def drop_finished(self, records: Iterable[Record]) -> None:
        """Forgets jobs that have ended; their rows are asked for from now on."""
        for record in records:
            if isinstance(record, JobRecord) and record.finished_at is not None:
                self.jobs.pop(record.id, None)
                self._rates.forget(record.id)
