"""How a registry that cannot be used is refused: by name, without its password."""

from __future__ import annotations

import sqlite3

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from linker_core.errors import InvalidRequestError

REGISTRY_PARAM = "storage.registry_url"
_REMEDY = "Mend it, restore a copy, or choose another registry_url or state directory."
_MAKE_ROOM = "Free space on its disk, or choose another registry_url or state directory."
# What SQLite says where the database cannot grow, and where the file beside it cannot; to be told
# "disk I/O error" of the latter, and to restore a copy, would harm a registry that is sound.
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def unusable(url: URL, reason: str, *, remedy: str = _REMEDY) -> InvalidRequestError:
    """Returns the error of a registry that cannot be opened."""
    where = url.render_as_string(hide_password=True)
    return InvalidRequestError(
        f"The registry {where} cannot be used: {reason}. {remedy}", param=REGISTRY_PARAM
    )


def refused(url: URL, error: SQLAlchemyError) -> InvalidRequestError:
    """Returns the error of a registry that the database refused to open."""
    remedy = _MAKE_ROOM if _has_no_room(error) else _REMEDY
    return unusable(url, reason_of(error), remedy=remedy)


def reason_of(error: SQLAlchemyError) -> str:
    """Returns the first line of what the database said: no statement, no values."""
    if _has_no_room(error):
        return "database or disk is full"
    said = str(error.orig if isinstance(error, DBAPIError) else error)
    return said.strip().partition("\n")[0].rstrip(".")


def _has_no_room(error: SQLAlchemyError) -> bool:
    cause = error.orig if isinstance(error, DBAPIError) else None
    # Errors that Python finds have no code, as of a text that is not UTF-8.
    return isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", None) in _NO_ROOM
