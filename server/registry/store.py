"""The registry: verbs over its tables. Synchronous; asynchronous callers go through a thread.

Any thread may call it; every verb is one transaction.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, Self

import orjson
from sqlalchemy import Text, cast, select, update
from sqlalchemy import delete as remove
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from linker_core.errors import ConflictError, NotReadyError
from server.registry.database import open_database
from server.registry.records import (
    BaseRecord,
    JobRecord,
    Json,
    KeyRecord,
    ModelRecord,
    Record,
    ReplayRecord,
    StudyRecord,
)
from server.registry.refusal import reason_of
from server.registry.tables import (
    Base,
    BaseRow,
    JobRow,
    KeyRow,
    ModelRow,
    ReplayRow,
    ScanRow,
    StudyRow,
    StudyTensorRow,
    TuningRow,
)
from server.registry.tenure import TakenError, Tenure

logger = logging.getLogger(__name__)

MAX_REPLAYS = 4096  # clients choose keys, and one that asks for the same again adds one each time
MAX_TUNINGS_PER_PAIR = 16  # each holds a frontier: every tensor of some twenty plans
_PROBE = ""  # no idempotency key is empty
_NUL = "\0"  # which PostgreSQL takes in no text, so that no row holds it
_ROWS: Mapping[type[Record], type[Base]] = {
    ModelRecord: ModelRow,
    JobRecord: JobRow,
    BaseRecord: BaseRow,
    ReplayRecord: ReplayRow,
    KeyRecord: KeyRow,
    StudyRecord: StudyRow,
}


class Registry:
    """Models, scans, tunings, studies and jobs that outlive the process."""

    def __init__(self, engine: Engine, tenure: Tenure | None) -> None:
        self._engine = engine
        self._tenure = tenure
        self._is_failing = False

    @property
    def is_failing(self) -> bool:
        """Whether it could not be used the last time, and no `probe` has succeeded since."""
        return self._is_failing

    @classmethod
    def open(cls, url: str | URL) -> Self:
        """Opens the registry, creating or migrating what is missing.

        Raises:
            InvalidRequestError: It cannot be used, and the message says why and what to do.
        """
        return cls(*open_database(url))

    @classmethod
    def open_beside(cls, url: str | URL) -> Self:
        """Opens the registry while a server may use it, for its API keys and to look models up.

        Raises:
            InvalidRequestError: See `open`.
        """
        return cls(*open_database(url, beside=True))

    def close(self) -> None:
        """Closes every connection; another server may open the registry then."""
        if self._tenure is not None:
            self._tenure.end()
        self._engine.dispose()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Session]:
        """Commits at the end; what a locked, full or lost database raises becomes NotReadyError."""
        try:
            if self._tenure is not None:
                self._tenure.renew()
            with Session(self._engine) as session, session.begin():
                yield session
        except (IntegrityError, DataError):
            raise  # the rows are to blame
        except TakenError as error:
            self._is_failing = True
            logger.warning("another server has taken the registry")
            msg = "Another server has taken the registry; stop one of the two."
            raise NotReadyError(msg) from error
        except (DBAPIError, PoolTimeoutError) as error:
            self._is_failing = True
            logger.warning("the registry failed: %s", reason_of(error))
            msg = "The registry cannot be used at the moment; try again later."
            raise NotReadyError(msg) from error

    def probe(self) -> None:
        """Finds out whether it can be written: asks for the right to, and once it fails, writes.

        Raises:
            NotReadyError: It cannot be written.
        """
        with self._transaction() as session:
            if self._is_failing:  # a full disk shows in nothing less
                session.merge(ReplayRow(key=_PROBE, digest="", job="", created_at=0.0))
                session.flush()
            session.execute(remove(ReplayRow).where(ReplayRow.key == _PROBE))
        self._is_failing = False

    def save(self, *records: Record) -> None:
        """Inserts or replaces rows, all of them in one transaction."""
        with self._transaction() as session:
            _merge(session, records)

    def replace(self, *, delete: Sequence[str], save: Sequence[Record]) -> None:
        """Deletes models and saves records, all of it in one transaction.

        Raises:
            ConflictError: One of the models to be deleted would still be the donor of another.
        """
        with self._transaction() as session:
            session.execute(remove(ModelRow).where(ModelRow.name.in_(delete)))
            _merge(session, save)
            stranded = select(ModelRow.name).where(ModelRow.donor.in_(delete))
            dependants = session.scalars(stranded.order_by(ModelRow.position)).all()
            if dependants:
                raise ConflictError(
                    f"{', '.join(delete)}: the donor of {', '.join(dependants)}; delete those "
                    "first, or rehome them."
                )

    def models(self) -> list[ModelRecord]:
        """Returns every known model in order of arrival."""
        with self._transaction() as session:
            rows = session.scalars(select(ModelRow).order_by(ModelRow.position))
            return [ModelRecord(**_columns(row, ModelRecord)) for row in rows]

    def model(self, name: str) -> ModelRecord | None:
        """Returns one model, or None."""
        with self._transaction() as session:
            row = session.get(ModelRow, name)
            return None if row is None else ModelRecord(**_columns(row, ModelRecord))

    def delete_model(self, name: str) -> None:
        """Deletes a model's row; its jobs, scans and tunings stay.

        Raises:
            ConflictError: The model is the donor of others.
        """
        self.replace(delete=(name,), save=())

    def touch(self, last_used_at: Mapping[str, float]) -> None:
        """Notes when models were last used."""
        with self._transaction() as session:
            for name, at in last_used_at.items():
                session.execute(
                    update(ModelRow).where(ModelRow.name == name).values(last_used_at=at)
                )

    def job(self, job_id: str) -> JobRecord | None:
        """Returns one job, or None."""
        if _NUL in job_id:
            return None
        with self._transaction() as session:
            row = session.get(JobRow, job_id)
            return None if row is None else JobRecord(**_columns(row, JobRecord))

    def jobs(self, *, model: str | None = None, limit: int) -> list[JobRecord]:
        """Returns at most `limit` jobs, the newest first."""
        query = select(JobRow).order_by(JobRow.created_at.desc()).limit(limit)
        if model is not None:
            query = query.where(JobRow.model == model)
        with self._transaction() as session:
            return [JobRecord(**_columns(row, JobRecord)) for row in session.scalars(query)]

    def unfinished_jobs(self) -> list[JobRecord]:
        """Returns the jobs that have not ended, the newest first."""
        unfinished = JobRow.finished_at.is_(None)
        query = select(JobRow).where(unfinished).order_by(JobRow.created_at.desc())
        with self._transaction() as session:
            return [JobRecord(**_columns(row, JobRecord)) for row in session.scalars(query)]

    def bases(self) -> list[BaseRecord]:
        """Returns the checkpoints that plans refer to though no model of them is left."""
        with self._transaction() as session:
            rows = session.scalars(select(BaseRow).order_by(BaseRow.fingerprint))
            return [BaseRecord(**_columns(row, BaseRecord)) for row in rows]

    def delete_base(self, fingerprint: str) -> None:
        """Forgets a base, if it is known."""
        with self._transaction() as session:
            session.execute(remove(BaseRow).where(BaseRow.fingerprint == fingerprint))

    def api_keys(self) -> list[KeyRecord]:
        """Returns every API key, revoked ones included, in order of creation."""
        with self._transaction() as session:
            rows = session.scalars(select(KeyRow).order_by(KeyRow.created_at, KeyRow.id))
            return [KeyRecord(**_columns(row, KeyRecord)) for row in rows]

    def replay(self, key: str) -> ReplayRecord | None:
        """Returns what an idempotency key was used for, or None."""
        if _NUL in key:
            return None
        with self._transaction() as session:
            row = session.get(ReplayRow, key)
            return None if row is None else ReplayRecord(**_columns(row, ReplayRecord))

    def forget_replays(self, before: float) -> None:
        """Forgets the idempotency keys first used before a time, in seconds since the epoch.

        Of later ones the newest `MAX_REPLAYS` stay.
        """
        used_at = ReplayRow.created_at
        newest = select(used_at).order_by(used_at.desc())
        with self._transaction() as session:
            oldest = session.scalar(newest.offset(MAX_REPLAYS - 1).limit(1))
            session.execute(remove(ReplayRow).where(used_at < max(before, oldest or before)))

    def scan(self, donor_fingerprint: str, variant_fingerprint: str) -> Json | None:
        """Returns the stored report of two checkpoints, or None."""
        with self._transaction() as session:
            row = session.get(ScanRow, (donor_fingerprint, variant_fingerprint))
            # A damaged report reads as {}, and is scanned again.
            return None if row is None or not row.report else row.report

    def save_scan(self, donor_fingerprint: str, variant_fingerprint: str, report: Json) -> None:
        """Keeps the report of two checkpoints."""
        with _both_may_write(), self._transaction() as session:
            session.merge(
                ScanRow(
                    donor_fingerprint=donor_fingerprint,
                    variant_fingerprint=variant_fingerprint,
                    report=dict(report),
                )
            )

    def tuning(self, donor_fingerprint: str, variant_fingerprint: str, key: str) -> Json | None:
        """Returns what a tuner found for two checkpoints, one goal and one text, or None."""
        with self._transaction() as session:
            row = session.get(TuningRow, (donor_fingerprint, variant_fingerprint, key))
            # A damaged result reads as {}, and is measured again.
            return None if row is None or not row.result else row.result

    def newest_tuning(
        self,
        donor_fingerprint: str,
        variant_fingerprint: str,
        *,
        where: Callable[[Json], bool],
    ) -> Json | None:
        """Returns the last of what a tuner found for two checkpoints that fits, or None."""
        query = (
            select(TuningRow.result)
            .where(
                TuningRow.donor_fingerprint == donor_fingerprint,
                TuningRow.variant_fingerprint == variant_fingerprint,
            )
            .order_by(TuningRow.saved_at.desc())
        )
        with self._transaction() as session:
            # One at a time: each is as large as all of a model's plans.
            found = session.scalars(query.execution_options(yield_per=1))
            return next((result for result in found if result and where(result)), None)

    def save_tuning(
        self, donor_fingerprint: str, variant_fingerprint: str, key: str, result: Json
    ) -> None:
        """Keeps what a tuner found, and of the same two checkpoints what was found last."""
        pair = (
            TuningRow.donor_fingerprint == donor_fingerprint,
            TuningRow.variant_fingerprint == variant_fingerprint,
        )
        newest = select(TuningRow.key).where(*pair).order_by(TuningRow.saved_at.desc())
        with _both_may_write(), self._transaction() as session:
            session.merge(
                TuningRow(
                    donor_fingerprint=donor_fingerprint,
                    variant_fingerprint=variant_fingerprint,
                    key=key,
                    saved_at=time.time(),
                    result=dict(result),
                )
            )
            too_many = session.scalars(newest.offset(MAX_TUNINGS_PER_PAIR)).all()
            session.execute(remove(TuningRow).where(*pair, TuningRow.key.in_(too_many)))

    def studies(self) -> list[StudyRecord]:
        """Returns every study, finished or not, the oldest first."""
        with self._transaction() as session:
            rows = session.scalars(select(StudyRow).order_by(StudyRow.created_at, StudyRow.key))
            return [StudyRecord(**_columns(row, StudyRecord)) for row in rows]

    def delete_studies(self, keys: Collection[str]) -> None:
        """Forgets studies and what they have found."""
        with self._transaction() as session:
            session.execute(remove(StudyTensorRow).where(StudyTensorRow.study.in_(keys)))
            session.execute(remove(StudyRow).where(StudyRow.key.in_(keys)))

    def study_tensors(self, key: str) -> list[str]:
        """Returns the tensors of which a study has found something so far, by name."""
        query = select(StudyTensorRow.name).where(StudyTensorRow.study == key)
        with self._transaction() as session:
            return list(session.scalars(query.order_by(StudyTensorRow.name)))

    def study_records(self, key: str, names: Collection[str]) -> dict[str, bytes]:
        """Returns what a study has found in some tensors, each a line of JSON.

        In the order of the names; what is not stored, or damaged, is left out. A record grows with
        the square of the fine-tunes' number: ask for few at a time.
        """
        # As text: the ORM's way to objects and back takes twenty times as long.
        text = cast(StudyTensorRow.record, Text)
        query = select(StudyTensorRow.name, text).where(
            StudyTensorRow.study == key, StudyTensorRow.name.in_(names)
        )
        with self._transaction() as session:
            found = {name: record for name, record in session.execute(query)}  # noqa: C416
        lines = {name: _line(found[name]) for name in names if name in found}
        return {name: line for name, line in lines.items() if line is not None}

    def save_study_tensors(self, key: str, records: Mapping[str, Json]) -> None:
        """Keeps what a stored study has found in some tensors.

        Raises:
            IntegrityError: There is no such study any more.
        """
        with self._transaction() as session:
            for name, record in records.items():
                session.merge(StudyTensorRow(study=key, name=name, record=dict(record)))


def _both_may_write() -> AbstractContextManager[None]:
    """Lets a row be that somebody else adds at the same time; its key says all of its contents."""
    return contextlib.suppress(IntegrityError)


def _columns(source: object, record: type[Record]) -> dict[str, Any]:
    return {field.name: getattr(source, field.name) for field in fields(record)}


def _line(text: str) -> bytes | None:
    """Returns an object's JSON in one line; None of what is damaged, or empty."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return orjson.dumps(value) if isinstance(value, dict) and value else None


def _merge(session: Session, records: Sequence[Record]) -> None:
    for record in records:
        session.merge(_ROWS[type(record)](**_columns(record, type(record))))
    session.flush()
