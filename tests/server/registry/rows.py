"""A model and a job to store."""

from __future__ import annotations

from server.registry.records import JobRecord, JobStage, JobStatus, ModelRecord, ModelState

MODEL = ModelRecord(
    name="acme/chat",
    source="/models/chat",
    request={"name": "acme/chat", "tau_cos": 0.99},
    state=ModelState.READY,
    position=1,
    created_at=10.0,
    donor=None,
    family="acme/chat",
    fingerprint="ab",
    plan={"policy": "donor"},
    max_model_len=128,
)
JOB = JobRecord(
    id="job-1", model="acme/chat", request={}, status=JobStatus.RUNNING, created_at=11.0,
    stage=JobStage.SCANNING, done_bytes=5 << 40, total_bytes=6 << 40,
)  # fmt: skip
