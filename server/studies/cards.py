"""What is said of a family's study over HTTP."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

from server.registry.records import StudyRecord
from server.studies.families import Family
from server.studies.studies import Studies


class StudyState(StrEnum):
    """Where the study of a family as it is now stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


def study_card(studies: Studies, family: Family, finished: StudyRecord | None) -> dict[str, Any]:
    """Returns how a family's study stands; what it has found is `finished.summary`.

    Args:
        studies: Knows what runs and what failed.
        family: Which.
        finished: Its newest finished study, if there is one.
    """
    attempt = studies.attempt(family)
    is_current = finished is not None and finished.key == family.key
    state, reason = _state(studies, family, is_current=is_current)
    shown = attempt.study if attempt is not None else finished if is_current else None
    return {
        "object": "analysis",
        "family": family.label,
        "state": state,
        "reason": reason,
        "error": None if is_current else _error(studies, family),
        "base": None if family.base is None else family.base.name,
        "variants": [member.name for member in family.variants],
        "same_weights": family.same_weights,
        "left_out": {
            str(member.name): error.to_record() for member, error in family.left_out.items()
        },
        "progress": None
        if attempt is None
        else {"done_tensors": len(attempt.done), "total_tensors": attempt.study.num_tensors},
        "is_current": is_current,
        "started_at": None if shown is None else shown.created_at,
        "finished_at": None if finished is None else finished.finished_at,
        "age_s": None if finished is None else age_s(finished),
    }


def age_s(study: StudyRecord) -> float | None:
    """Returns for how long a study has been finished, in seconds."""
    return None if study.finished_at is None else max(0.0, time.time() - study.finished_at)


def _error(studies: Studies, family: Family) -> dict[str, str | None] | None:
    """Returns why there is no study of a family as it is."""
    failure = studies.failure(family)
    if failure is not None:
        return failure.error.to_record()
    if family.key is not None:
        return None
    return next((error.to_record() for error in family.left_out.values()), None)


def _state(studies: Studies, family: Family, *, is_current: bool) -> tuple[StudyState, str | None]:
    """Returns where a study stands, and why it is not further."""
    failure = studies.failure(family)
    if studies.attempt(family) is not None:
        return StudyState.RUNNING, None
    if is_current:
        return StudyState.DONE, None
    if family.key is None and family.left_out:
        return StudyState.FAILED, family.why_not
    if family.key is None:
        return StudyState.WAITING, family.why_not
    if failure is not None:
        wait_s = studies.retry_in_s(family)
        return StudyState.FAILED, (
            f"It is tried again in {wait_s:.0f} s, or when the family's models have changed."
        )
    if not studies.is_enabled:
        return StudyState.WAITING, "The setting analysis.enabled is false."
    return StudyState.WAITING, studies.waits_for(family)
