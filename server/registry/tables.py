"""The tables of the registry. One column per field of the records, by the same name.

They describe what `migrations` has made; whoever changes one here adds a step there.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Dialect,
    Enum,
    ForeignKey,
    String,
    TypeDecorator,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from server.registry.records import JobStage, JobStatus, ModelState, Role


def _by_value(kind: type[StrEnum]) -> Enum:
    return Enum(
        kind, native_enum=False, length=16, values_callable=lambda e: [member.value for member in e]
    )


class _DamagedAsEmpty(TypeDecorator[Any]):
    """JSON whose damaged values read as {}, so that one of them spoils no listing."""

    impl = JSON
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        process = super().result_processor(dialect, coltype)
        if process is None:
            return None  # PostgreSQL keeps no JSON that cannot be read

        def read(value: object) -> object:
            try:
                return process(value)
            except ValueError:
                return {}

        return read


class Base(DeclarativeBase):
    """Carries the metadata of all tables."""


class ModelRow(Base):
    """A `ModelRecord`."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("alias", name="models_alias_key"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[ModelState] = mapped_column(_by_value(ModelState), index=True)
    position: Mapped[int]
    created_at: Mapped[float]
    # Checked when a transaction ends, so that rows may come and go in any order.
    donor: Mapped[str | None] = mapped_column(
        ForeignKey("models.name", name="models_donor_fkey", deferrable=True, initially="DEFERRED")
    )
    family: Mapped[str | None]
    fingerprint: Mapped[str | None]
    plan: Mapped[dict[str, Any] | None] = mapped_column(_DamagedAsEmpty(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    last_used_at: Mapped[float | None]
    max_model_len: Mapped[int | None]
    alias: Mapped[str | None]
    pinned: Mapped[bool] = mapped_column(server_default=false())
    keep_alive_s: Mapped[float | None]
    donor_choice: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    scores: Mapped[dict[str, Any] | None] = mapped_column(_DamagedAsEmpty(none_as_null=True))


class ScanRow(Base):
    """What two checkpoints have in common; the contents decide, so a row never goes stale."""

    __tablename__ = "scans"

    donor_fingerprint: Mapped[str] = mapped_column(primary_key=True)
    variant_fingerprint: Mapped[str] = mapped_column(primary_key=True)
    report: Mapped[dict[str, Any]] = mapped_column(_DamagedAsEmpty)


class TuningRow(Base):
    """What a tuner found for two checkpoints, goal, text and precision; never stale either."""

    __tablename__ = "tunings"

    donor_fingerprint: Mapped[str] = mapped_column(primary_key=True)
    variant_fingerprint: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)  # tuning_key of the rest
    saved_at: Mapped[float]
    result: Mapped[dict[str, Any]] = mapped_column(_DamagedAsEmpty)


class JobRow(Base):
    """A `JobRecord`."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(index=True)
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    status: Mapped[JobStatus] = mapped_column(_by_value(JobStatus))
    created_at: Mapped[float]
    stage: Mapped[JobStage] = mapped_column(_by_value(JobStage))
    done_bytes: Mapped[int] = mapped_column(BigInteger)
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    finished_at: Mapped[float | None]


class BaseRow(Base):
    """A `BaseRecord`."""

    __tablename__ = "bases"

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]


class ReplayRow(Base):
    """A `ReplayRecord`."""

    __tablename__ = "replays"

    key: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    job: Mapped[str]
    created_at: Mapped[float] = mapped_column(index=True)


class KeyRow(Base):
    """A `KeyRecord`."""

    __tablename__ = "keys"
    __table_args__ = (UniqueConstraint("digest", name="keys_digest_key"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    role: Mapped[Role] = mapped_column(_by_value(Role))
    prefix: Mapped[str]
    digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    max_parallel: Mapped[int | None]


class StudyRow(Base):
    """A `StudyRecord`."""

    __tablename__ = "studies"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    family: Mapped[str]
    base: Mapped[dict[str, Any]] = mapped_column(_DamagedAsEmpty)
    variants: Mapped[dict[str, Any]] = mapped_column(_DamagedAsEmpty)
    created_at: Mapped[float]
    num_tensors: Mapped[int | None]
    summary: Mapped[dict[str, Any] | None] = mapped_column(_DamagedAsEmpty(none_as_null=True))
    finished_at: Mapped[float | None]


class StudyTensorRow(Base):
    """What a study has found in one tensor; it goes with its study."""

    __tablename__ = "study_tensors"

    study: Mapped[str] = mapped_column(
        ForeignKey("studies.key", name="study_tensors_study_fkey", ondelete="CASCADE"),
        primary_key=True,
    )
    name: Mapped[str] = mapped_column(primary_key=True)
    record: Mapped[dict[str, Any]] = mapped_column(_DamagedAsEmpty)
