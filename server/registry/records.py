"""The rows of the registry as frozen records. Knows no SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Json = Mapping[str, Any]


class ModelState(StrEnum):
    """Where a model stands, in the words of the HTTP interface."""

    ONBOARDING = "onboarding"
    READY = "ready"
    UNLOADED = "unloaded"
    FAILED = "failed"


SERVABLE = (ModelState.READY, ModelState.UNLOADED)  # those that a request may be for


class JobStatus(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobStage(StrEnum):
    """What a running job is doing."""

    VALIDATING = "validating"
    SCANNING = "scanning"
    TUNING = "tuning"
    LOADING = "loading"


class Role(StrEnum):
    """What a key is for."""

    CLIENT = "client"  # generation, and the models to generate with
    ADMIN = "admin"  # everything
    METRICS = "metrics"  # what a scraper reads, and all else that shows models and changes nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """One model. `request` is the onboarding request it came from, the measure of "identical"."""

    name: str
    source: str  # resolved directory
    request: Json
    state: ModelState
    position: int  # order of arrival; decides the order of lists
    created_at: float  # seconds since the epoch
    donor: str | None = None  # None: the donor of its own family
    family: str | None = None  # the donor's name
    fingerprint: str | None = None
    plan: Json | None = None  # SharePlan.to_json
    error: Json | None = None  # LinkerError.to_record
    last_used_at: float | None = None
    max_model_len: int | None = None  # as served
    alias: str | None = None  # a second name, which requests may use
    pinned: bool = False  # never evicted, and loaded at every start
    keep_alive_s: float | None = None  # idle seconds until eviction; None: the settings'
    donor_choice: Json | None = None  # DonorChoice.to_json; None: not chosen yet, or long ago
    scores: Json | None = None  # by whose weights and task; see `server.onboarding.scores`


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One onboarding job."""

    id: str
    model: str
    request: Json
    status: JobStatus
    created_at: float
    stage: JobStage = JobStage.VALIDATING
    done_bytes: int = 0
    total_bytes: int = 0
    error: Json | None = None
    result: Json | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """A checkpoint that plans refer to though no model of it is left."""

    fingerprint: str
    source: str  # resolved directory


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRecord:
    """What an idempotency key was used for."""

    key: str
    digest: str  # of method, path and body
    job: str  # its id
    created_at: float  # seconds since the epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """An API key, but for the key itself, which nobody has but its owner."""

    id: str
    name: str
    role: Role
    prefix: str  # the key's first characters, to recognise it by
    digest: str  # SHA-256 of the key
    created_at: float  # seconds since the epoch
    revoked_at: float | None = None
    requests_per_minute: int | None = None  # None: no limit of its own
    tokens_per_minute: int | None = None
    max_parallel: int | None = None  # sequences waiting or running


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """A study of what fine-tuning did to one family's weights, begun or finished."""

    key: str  # a digest of all that decides what it finds
    family: str  # the donor's name
    base: Json  # name, fingerprint
    variants: Json  # name -> fingerprint, in the order that the rows of tensors have them in
    created_at: float  # seconds since the epoch
    num_tensors: int | None = None  # None: not known yet
    summary: Json | None = None
    finished_at: float | None = None  # seconds since the epoch


Record = ModelRecord | JobRecord | BaseRecord | ReplayRecord | KeyRecord | StudyRecord
