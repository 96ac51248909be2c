"""What benchmarks say of a model, beside its plan. Measures nothing; whoever did says so."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from linker_core.errors import ConflictError
from server.onboarding.roster import Roster
from server.registry.records import Json, ModelRecord

Weights = Literal["planned", "unshared"]
MAX_TASKS = 256  # of a model and one of its two weights; the oldest leave


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """How one model did in one task."""

    task: str
    metrics: Mapping[str, float]  # by metric: a mean, mostly a share from 0 to 1
    stderr: Mapping[str, float]  # of those metrics whose error is known
    num_samples: int | None
    num_fewshot: int | None
    is_partial: bool  # whether only the task's first samples were asked
    harness: str  # who measured: a program and its version

    def to_json(self) -> dict[str, Any]:
        """Returns the score as plain JSON values."""
        return {field: getattr(self, field) for field in self.__dataclass_fields__} | {
            "metrics": dict(self.metrics),
            "stderr": dict(self.stderr),
        }


async def add_scores(
    roster: Roster, name: str, weights: Weights, scores: list[TaskScore], *, plan: str | None
) -> None:
    """Stores what a model scored, in the place of what it scored in the same tasks before.

    Args:
        roster: The known models.
        name: The model.
        weights: Whose answers were scored.
        scores: One for each task.
        plan: The digest of the plan that answered; None: the one that the model has.

    Raises:
        ModelNotFoundError: There is no such model.
        ConflictError: It has no plan, or another one by now.
        NotReadyError: The registry cannot be written; nothing has changed.
    """

    def changed(record: ModelRecord) -> ModelRecord:
        known = _digest_of(record)
        if plan not in (None, known):
            raise ConflictError(
                f"The model {name!r} has been planned anew since it was scored; score it again."
            )
        return replace(record, scores=_with(record, weights, scores, known))

    _digest_of(roster.model(name))
    await roster.writes.change(lambda: roster.model(name), changed)


def shown_scores(record: ModelRecord) -> dict[str, Any] | None:
    """Returns what a model scored, as far as it holds for the weights that it has now.

    `retention` is a score of the planned weights over that of the unshared ones, where both have
    answered the same samples.
    """
    if not record.scores or record.plan is None:
        return None
    digest = plan_digest(record.plan)
    planned = {
        task: _shown(score)
        for task, score in record.scores.get("planned", {}).items()
        if score["plan"] == digest
    }
    unshared = {
        task: _shown(score)
        for task, score in record.scores.get("unshared", {}).items()
        if score["fingerprint"] == record.fingerprint
    }
    if not planned and not unshared:
        return None
    return {
        "planned": planned,
        "unshared": unshared,
        "retention": {
            task: ratios
            for task in planned.keys() & unshared.keys()
            if (ratios := _retained(planned[task], unshared[task]))
        },
    }


def plan_digest(plan: Json) -> str:
    """Returns what tells plans apart that store different weights, of whatever policy."""
    said = [plan["donor_fingerprint"], plan["variant_fingerprint"], sorted(plan["rungs"].items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _digest_of(record: ModelRecord) -> str:
    if record.plan is None:
        raise ConflictError(f"The model {record.name!r} has no plan yet, so nothing to be scored.")
    return plan_digest(record.plan)


def _with(
    record: ModelRecord, weights: Weights, scores: list[TaskScore], digest: str
) -> dict[str, Any]:
    """Returns a model's scores with new ones last."""
    known = dict(record.scores or {})
    tasks = dict(known.get(weights, {}))
    for score in scores:
        tasks.pop(score.task, None)
        tasks[score.task] = score.to_json() | {
            "plan": digest,
            "fingerprint": record.fingerprint,
            "scored_at": time.time(),
        }
    newest = sorted(tasks.items(), key=lambda item: -float(item[1]["scored_at"]))[:MAX_TASKS]
    return known | {weights: dict(newest)}


def _shown(score: Json) -> dict[str, Any]:
    hidden = ("task", "plan", "fingerprint")
    return {field: value for field, value in score.items() if field not in hidden}


def _retained(planned: Json, unshared: Json) -> dict[str, float]:
    same = ("num_samples", "num_fewshot", "is_partial")
    if any(planned[field] != unshared[field] for field in same):
        return {}
    both = planned["metrics"].keys() & unshared["metrics"].keys()
    return {
        metric: planned["metrics"][metric] / unshared["metrics"][metric]
        for metric in sorted(both)
        if unshared["metrics"][metric]
    }
