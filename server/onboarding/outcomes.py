"""How models and jobs end: the records that say so. Stores nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    JobCancelledError,
    LinkerError,
)
from linker_core.sharing.plan import SharePlan
from server.registry.records import JobRecord, JobStatus, Json, ModelRecord, ModelState


def without_plan(record: ModelRecord) -> ModelRecord:
    """Returns a model whose stored plan is damaged."""
    error = BadCheckpointError(
        "The stored plan of this model cannot be read. Delete the model and onboard it again."
    )
    return failed_model(replace(record, plan=None), error)


def failed_model(record: ModelRecord, error: LinkerError) -> ModelRecord:
    """Returns a model that cannot be served, and why."""
    return replace(record, state=ModelState.FAILED, error=error.to_record())


def failed_job(job: JobRecord, error: LinkerError) -> JobRecord:
    """Returns a job that ended without a model."""
    return replace(job, status=JobStatus.FAILED, error=error.to_record(), finished_at=time.time())


def interrupted_job(job: JobRecord) -> JobRecord:
    """Returns a job whose model went another way while the server was down."""
    return failed_job(job, EngineFailureError("The server stopped before the job was done."))


def unwanted_job(job: JobRecord) -> JobRecord:
    """Returns a job that somebody has cancelled, while what it has begun is being undone."""
    error = JobCancelledError("The job was cancelled before it was done.")
    return replace(job, error=error.to_record())


def cancelled_job(job: JobRecord) -> JobRecord:
    """Returns a job that was cancelled, and of which nothing is left."""
    return replace(unwanted_job(job), status=JobStatus.CANCELLED, finished_at=time.time())


def succeeded_job(
    job: JobRecord,
    plan: SharePlan,
    seconds: Mapping[str, float],
    *,
    donor_choice: Json | None = None,
) -> JobRecord:
    """Returns a job whose model is resident, with what it spent in every stage.

    Args:
        job: As it ran.
        plan: What is stored.
        seconds: Of each stage.
        donor_choice: Why the model has its donor; None if the job did not choose it.
    """
    return replace(
        job,
        status=JobStatus.SUCCEEDED,
        done_bytes=job.total_bytes,
        error=None,
        result={
            "id": job.model,
            "fingerprint": plan.variant_fingerprint,
            "bytes": plan.bytes_by_kind,
            "policy": plan.policy.value,
            "price": None if plan.price is None else plan.price.to_json(),
            "budget_kl": plan.budget_kl,
            "donor_choice": donor_choice,
            "seconds": dict(seconds),
        },
        finished_at=time.time(),
    )


def retimed_job(job: JobRecord, seconds: Mapping[str, float]) -> JobRecord:
    """Returns a succeeded job whose last stage has ended too: its own storing."""
    assert job.result is not None
    return replace(job, result={**job.result, "seconds": dict(seconds)})
