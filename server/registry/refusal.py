"""How a registry that cannot be used is refused: by name, without its password."""

from __future__ import annotations

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from linker_core.errors import InvalidRequestError

REGISTRY_PARAM = "storage.registry_url"
_REMEDY = "Mend it, restore a copy, or choose another registry_url or state directory."


def unusable(url: URL, reason: str, *, remedy: str = _REMEDY) -> InvalidRequestError:
    """Returns the error of a registry that cannot be opened."""
    where = url.render_as_string(hide_password=True)
    return InvalidRequestError(
        f"The registry {where} cannot be used: {reason}. {remedy}", param=REGISTRY_PARAM
    )


def reason_of(error: SQLAlchemyError) -> str:
    """Returns the first line of what the database said: no statement, no values."""
    said = str(error.orig if isinstance(error, DBAPIError) else error)
    return said.strip().partition("\n")[0].rstrip(".")
