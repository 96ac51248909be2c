"""What the log says of a job: when it begins, each stage once, how it ended and when."""

from __future__ import annotations

import logging
import time

from server.onboarding.live_job import LiveJob
from server.registry.records import JobStage

logger = logging.getLogger(__name__)


def say_begun(live: LiveJob) -> None:
    """Logs that a job begins; nothing of one that had begun and has its turn now."""
    if live.begun_s is None:
        live.begun_s = time.monotonic()
        logger.info("%s begins (%s)", _work(live), live.id)


def say_stage(live: LiveJob, stage: JobStage) -> None:
    """Logs the stage that a job is at, the first time it is heard of."""
    if stage not in live.stages:
        live.stages.add(stage)
        logger.info("%s: %s", _work(live), stage.value)


def say_succeeded(live: LiveJob) -> None:
    """Logs that a model has what its job was for."""
    logger.info("%s: done%s", _work(live), _after(live))


def say_cancelled(live: LiveJob) -> None:
    """Logs that a job was cancelled."""
    logger.info("%s: cancelled%s", _work(live), _after(live))


def say_failed(live: LiveJob, why: str) -> None:
    """Logs why a job failed."""
    kept = "; it keeps its plan" if live.replans else ""
    logger.warning("%s failed%s%s: %s", _work(live), _after(live), kept, why)


def _work(live: LiveJob) -> str:
    return f"re-planning {live.model}" if live.replans else f"onboarding {live.model}"


def _after(live: LiveJob) -> str:
    if live.begun_s is None:
        return " before it began"
    return f" after {time.monotonic() - live.begun_s:.1f} s"
