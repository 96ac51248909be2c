"""The registry: verbs over three tables. Synchronous; asynchronous callers go through a thread.

Any thread may call it; every verb is one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from sqlalchemy import create_engine, event, select, update
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from linker_core.errors import ConflictError
from server.registry.records import JobRecord, Json, ModelRecord
from server.registry.tables import Base, JobRow, ModelRow, ScanRow

_SQLITE_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",  # a row that was acknowledged survives a power cut
    "PRAGMA foreign_keys=ON",
    "PRAGMA busy_timeout=5000",
)


class Registry:
    """Models, scans and jobs that outlive the process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str | URL) -> Self:
        """Opens the registry, creating what is missing ."""
        parsed = make_url(url)
        engine = create_engine(parsed)
        if parsed.get_backend_name() == "sqlite":
            event.listen(engine, "connect", _set_pragmas)
        Base.metadata.create_all(engine)
        return cls(engine)

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()

    def save(self, *records: ModelRecord | JobRecord) -> None:
        """Inserts or replaces rows, all of them in one transaction."""
        with Session(self._engine) as session, session.begin():
            for record in records:
                session.merge(_to_row(record))

    def models(self) -> list[ModelRecord]:
        """Returns every known model in order of arrival."""
        with Session(self._engine) as session:
            rows = session.scalars(select(ModelRow).order_by(ModelRow.position))
            return [ModelRecord(**_columns(row, ModelRecord)) for row in rows]

    def model(self, name: str) -> ModelRecord | None:
        """Returns one model, or None."""
        with Session(self._engine) as session:
            row = session.get(ModelRow, name)
            return None if row is None else ModelRecord(**_columns(row, ModelRecord))

    def delete_model(self, name: str) -> None:
        """Deletes a model's row; its jobs and scans stay.

        Raises:
            ConflictError: The model is the donor of others.
        """
        try:
            with Session(self._engine) as session, session.begin():
                row = session.get(ModelRow, name)
                if row is not None:
                    session.delete(row)
        except IntegrityError as error:
            msg = f"The model {name!r} is the donor of other models; delete those first."
            raise ConflictError(msg) from error

    def touch(self, last_used_at: Mapping[str, float]) -> None:
        """Notes when models were last used."""
        with Session(self._engine) as session, session.begin():
            for name, at in last_used_at.items():
                session.execute(
                    update(ModelRow).where(ModelRow.name == name).values(last_used_at=at)
                )

    def job(self, job_id: str) -> JobRecord | None:
        """Returns one job, or None."""
        with Session(self._engine) as session:
            row = session.get(JobRow, job_id)
            return None if row is None else JobRecord(**_columns(row, JobRecord))

    def jobs(self, *, model: str | None = None) -> list[JobRecord]:
        """Returns jobs, the newest first."""
        query = select(JobRow).order_by(JobRow.created_at.desc())
        if model is not None:
            query = query.where(JobRow.model == model)
        with Session(self._engine) as session:
            return [JobRecord(**_columns(row, JobRecord)) for row in session.scalars(query)]

    def scan(self, donor_fingerprint: str, variant_fingerprint: str) -> Json | None:
        """Returns the stored report of two checkpoints, or None."""
        with Session(self._engine) as session:
            row = session.get(ScanRow, (donor_fingerprint, variant_fingerprint))
            return None if row is None else row.report

    def save_scan(self, donor_fingerprint: str, variant_fingerprint: str, report: Json) -> None:
        """Keeps the report of two checkpoints."""
        with Session(self._engine) as session, session.begin():
            session.merge(
                ScanRow(
                    donor_fingerprint=donor_fingerprint,
                    variant_fingerprint=variant_fingerprint,
                    report=dict(report),
                )
            )


def _set_pragmas(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    for pragma in _SQLITE_PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _columns(source: object, record: type[ModelRecord] | type[JobRecord]) -> dict[str, Any]:
    return {field.name: getattr(source, field.name) for field in fields(record)}


def _to_row(record: ModelRecord | JobRecord) -> ModelRow | JobRow:
    columns = _columns(record, type(record))
    return ModelRow(**columns) if isinstance(record, ModelRecord) else JobRow(**columns)
