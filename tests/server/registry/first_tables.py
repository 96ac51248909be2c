"""A registry as the version before the migrations made it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import NullPool

_SCRIPT = Path(__file__).with_suffix(".sql")


@contextmanager
def connected(url: URL) -> Iterator[Connection]:
    """A connection that knows nothing of the registry."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        yield connection


def make_first_tables(url: URL) -> None:
    """Makes the tables, with a donor, its variant `near`, a job and a scan."""
    with connected(url) as connection:
        for statement in _SCRIPT.read_text().split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
