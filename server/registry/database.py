"""Opens the database of a registry: the driver, its settings, its health and its tables."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from linker_core.errors import InvalidRequestError
from server.registry.migration import is_current, is_made, migrate
from server.registry.refusal import REGISTRY_PARAM, refused, unusable
from server.registry.tenure import TakenError, Tenure

_DRIVER = "postgresql+psycopg"  # the one of the extra `postgres`
# What every connection is told first.
_SETTINGS: Mapping[str, Sequence[str]] = {
    "sqlite": (
        "PRAGMA journal_mode=WAL",
        "PRAGMA synchronous=FULL",  # a row that was acknowledged survives a power cut
        "PRAGMA foreign_keys=ON",
        "PRAGMA busy_timeout=5000",
    ),
    "postgresql": ("SET lock_timeout = 5000",),
}
# So that a database that is gone is noticed: not to be connected to, or silent (milliseconds).
_CONNECTING: Mapping[str, Mapping[str, int]] = {
    "sqlite": {},
    "postgresql": {"connect_timeout": 5, "tcp_user_timeout": 10_000},
}


class Database(NamedTuple):
    """An open database, and what keeps other servers out of it."""

    engine: Engine
    tenure: Tenure | None  # None: the lock of the state directory does


def open_database(url: str | URL, *, beside: bool = False) -> Database:
    """Opens a database and makes or migrates its tables.

    Args:
        url: Which.
        beside: Nobody is kept out, for rows that servers read again while they run. Tables are
            made or migrated all the same, unless a server uses them.

    Raises:
        InvalidRequestError: Not a URL, no driver for it, no such database, a damaged one, one that
            another server uses, or one that a newer version or another program has made.
    """
    parsed = parse_url(url)
    engine = _create(parsed)
    _make_private(parsed)
    settings = _SETTINGS[engine.dialect.name]

    def tell(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        for setting in settings:
            cursor.execute(setting)
        cursor.close()
        connection.commit()  # a rollback would take a setting back

    event.listen(engine, "connect", tell)
    try:
        return _opened_beside(engine) if beside else _opened(engine)
    except TakenError as error:
        engine.dispose()
        raise unusable(
            parsed,
            "another server uses it",
            remedy="Stop that one, or give this one a database or a schema of its own.",
        ) from error
    except SQLAlchemyError as error:
        engine.dispose()
        raise refused(parsed, error) from error
    except BaseException:
        engine.dispose()
        raise


def registry_exists(url: str | URL) -> bool:
    """Whether there is a registry to open; none is made.

    One that cannot be asked is there: opening it says what is wrong.

    Raises:
        InvalidRequestError: Not a URL, or no driver for it.
    """
    parsed = parse_url(url)
    file = _file(parsed)
    if file is not None and not file.exists():
        return False
    engine = _create(parsed)
    try:
        return is_made(engine)
    except SQLAlchemyError:
        return True
    finally:
        engine.dispose()


def _opened(engine: Engine) -> Database:
    if engine.dialect.name == "sqlite":
        _check_pages(engine)
        migrate(engine)
        return Database(engine, None)
    tenure = Tenure(engine)  # first: while a server runs, nobody migrates under it
    try:
        migrate(engine)
    except BaseException:
        tenure.end()
        raise
    return Database(engine, tenure)


def _opened_beside(engine: Engine) -> Database:
    if not is_current(engine):
        tenure = _opened(engine).tenure
        if tenure is not None:
            tenure.end()
    return Database(engine, None)


def parse_url(url: str | URL) -> URL:
    """Returns what a registry's URL says.

    Raises:
        InvalidRequestError: It cannot be parsed.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        # Not repeated here: it may hold a password in a place that cannot be made out.
        raise InvalidRequestError(
            "The registry's URL cannot be parsed. Write sqlite:///FILE, or "
            "postgresql+psycopg://USER:PASSWORD@HOST/NAME.",
            param=REGISTRY_PARAM,
        ) from error
    # SQLAlchemy would look for another driver where none is named.
    return parsed.set(drivername=_DRIVER) if parsed.drivername == "postgresql" else parsed


def _file(url: URL) -> Path | None:
    """Returns where SQLite keeps a database, None where that is no plain file."""
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    if not is_file or str(url.database).startswith("file:"):
        return None
    return Path(str(url.database))


def _make_private(url: URL) -> None:
    """Makes a new SQLite file for its owner alone; what is written beside it has its mode."""
    file = _file(url)
    if file is not None:
        with contextlib.suppress(OSError):  # it is there, or SQLite says why it cannot be
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _create(url: URL) -> Engine:
    backend = url.get_backend_name()
    if backend not in _SETTINGS:
        raise unusable(
            url, f"{backend} is no database we know", remedy="Use sqlite or postgresql+psycopg."
        )
    try:
        return create_engine(
            url,
            connect_args=dict(_CONNECTING[backend]),
            json_serializer=partial(json.dumps, allow_nan=False),  # PostgreSQL refuses NaN
            pool_pre_ping=True,  # replaces a connection that the database has closed since
        )
    except (ArgumentError, ImportError) as error:
        raise unusable(
            url,
            "its driver is not installed",
            remedy="For postgresql+psycopg, pip install '.[postgres]' in a clone of this project.",
        ) from error


def _check_pages(engine: Engine) -> None:
    with engine.connect() as connection:
        found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalars().all()
    if found != ["ok"]:
        raise unusable(engine.url, f"it is damaged ({found[0]})")
