"""One server per PostgreSQL registry, wherever it runs: a lock that ends with its connection.

A server keeps the rows it knows in memory, so a second one would neither see nor be seen. SQLite
needs none of this: its file lies in a state directory, which `StateLock` guards.
"""

from __future__ import annotations

import threading

from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError

# Advisory locks are numbers of the database's own; a schema of its own makes a registry of its own.
_TAKE = text("SELECT pg_advisory_lock(1279872594, hashtext(current_schema()))")
_ASK = text("SELECT 1")
_TIMED_OUT = "55P03"  # lock_not_available


class TakenError(Exception):
    """Another server holds the registry."""


class Tenure:
    """Holds a registry until `end`. Any thread may ask.

    Raises:
        TakenError: Another server holds it.
        SQLAlchemyError: The database cannot be asked.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asking = threading.Lock()  # guards the connection
        self._connection: Connection | None = self._take()

    def renew(self) -> None:
        """Makes sure that the registry is still ours; takes it anew after a lost connection.

        Raises:
            TakenError: Another server has taken it meanwhile.
            SQLAlchemyError: The database cannot be asked.
        """
        with self._asking:
            if self._connection is not None and not _answers(self._connection):
                self._connection = None
            if self._connection is None:
                self._connection = self._take()

    def end(self) -> None:
        """Lets the next server have the registry."""
        with self._asking:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _take(self) -> Connection:
        """Waits as long as for any other lock: a killed server's connection ends soon after it."""
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()
        try:
            connection.execute(_TAKE)
        except OperationalError as error:
            connection.close()
            if getattr(error.orig, "sqlstate", None) == _TIMED_OUT:
                raise TakenError from error
            raise
        return connection


def _answers(connection: Connection) -> bool:
    """Returns whether a connection, and with it its lock, is there; closes it if not."""
    try:
        connection.execute(_ASK)
    except DBAPIError:
        connection.close()
        return False
    return True
