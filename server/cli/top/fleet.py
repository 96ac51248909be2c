"""What a terminal knows of a server: its events, one after another, and the rates between them.

Knows no HTTP and draws nothing. Times are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.cli.top.records import Job, Model, Status, shown_text

_STATUS_S = 1.0  # a server's status comes with what there is, or never
_STILL_S = 3.0  # a server that has said nothing for so long has nothing to say


class Fleet:
    """The models, jobs and state of one server, as of its last event."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.jobs: dict[str, Job] = {}
        self.status: Status | None = None  # None: it has said none
        self.trouble: str | None = None  # why what is known may be old
        self._before: Status | None = None  # the one before `status`
        self._said_at = 0.0
        self._begun_at = 0.0

    @property
    def has_rates(self) -> bool:
        """Whether two statuses have come, so that something lies between them."""
        return self._before is not None

    def lacks_status(self, *, now_s: float) -> bool:
        """Says whether the server says nothing of its state, as older ones do."""
        return self.status is None and now_s - self._begun_at > _STATUS_S

    def apply(self, event: Mapping[str, Any], *, now_s: float) -> None:
        """Takes an event of GET /models/events in; kinds that nobody here knows are left alone.

        Args:
            event: As it was sent.
            now_s: Seconds of this side's monotonic clock.
        """
        match event["type"]:
            case "snapshot":
                self.trouble = None
                self._begun_at = now_s
                # Another server, perhaps: nothing of the last one is comparable with it.
                self.status = self._before = None
                self.models = {m.name: m for m in map(Model.of_json, event["models"])}
                self.jobs = {j.id: j for j in map(Job.of_json, event["jobs"])}
            case "model":
                model = Model.of_json(event["model"])
                self.models[model.name] = model
            case "model.deleted":
                self.models.pop(shown_text(event["id"]), None)
            case "job":
                self._take(Job.of_json(event["job"]))
            case "status":
                self._before, self.status = self.status, Status.of_json(event)
                self._said_at = now_s

    def _take(self, job: Job) -> None:
        """Keeps a job that is under way, and the last that failed until its model has another."""
        for known in list(self.jobs.values()):
            if not known.is_live and (job.has_failed or known.model == job.model):
                del self.jobs[known.id]
        self.jobs.pop(job.id, None)
        if job.is_live or job.has_failed:
            self.jobs[job.id] = job

    def rate(self, total: str, *, now_s: float) -> float | None:
        """Returns how fast one of the server's totals grows, per second; None: not known yet."""
        if self.status is None or self._is_still(now_s):
            return None if self.status is None else 0.0
        if self._before is None:
            return None
        return self._rate(self._before.totals[total], self.status.totals[total])

    def model_rate(self, model: str, *, now_s: float) -> float | None:
        """Returns how many tokens a model writes per second; None: not known yet."""
        if self.status is None or model not in self.status.models or self._is_still(now_s):
            return None if self.status is None else 0.0
        if self._before is None or model not in self._before.models:
            return None
        before, after = self._before.models[model], self.status.models[model]
        return self._rate(before.generation_tokens, after.generation_tokens)

    def _is_still(self, now_s: float) -> bool:
        return now_s - self._said_at > _STILL_S

    def _rate(self, before: int, after: int) -> float | None:
        assert self.status is not None
        assert self._before is not None
        passed_s = self.status.at_s - self._before.at_s
        # Totals go back where a model was deleted, and begin anew with another engine.
        return (after - before) / passed_s if passed_s > 0 and after >= before else None

    @property
    def saved_bytes(self) -> int:
        """What separate copies of the resident models would take more; see `_unshared_bytes`."""
        return self.separate_bytes - self._unique_bytes - self._unshared_bytes

    @property
    def separate_bytes(self) -> int:
        """What separate copies of the resident models would take."""
        sizes = [m.sizes for m in self.models.values() if m.is_resident]
        return sum(one.logical for one in sizes if one is not None)

    @property
    def _unique_bytes(self) -> int:
        sizes = [m.sizes for m in self.models.values() if m.is_resident]
        return sum(one.unique for one in sizes if one is not None)

    @property
    def _unshared_bytes(self) -> int:
        """What twins to compare with hold, which are in no model's record and save nothing."""
        unique = self._unique_bytes
        if self.status is None or self.status.device is None or unique == 0:
            return 0
        weights = self.status.device.weights
        apart = weights - unique
        return apart if apart * 1000 >= weights else 0  # records may come later than the sum
