"""Brings a registry's tables to what this version knows, or refuses those it cannot use.

All steps are one transaction: a kill at any moment leaves the old tables or the new ones.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect
from sqlalchemy.engine import Connection, Engine

from server.registry.refusal import unusable
from server.registry.tables import Base

logger = logging.getLogger(__name__)

VERSION_TABLE = "registry_version"  # a database may hold other programs' alembic_version
_FIRST_TABLE = "models"  # there since before there were versions
_SCRIPTS = Path(__file__).parent / "migrations"
_ALEMBIC = threading.Lock()  # its `context` and `op` belong to the process


def migrate(engine: Engine) -> None:
    """Runs the steps that a registry has not seen.

    Raises:
        InvalidRequestError: A newer version wrote it, or its tables are another program's.
        SQLAlchemyError: The database refuses a step; nothing has changed.
    """
    scripts = ScriptDirectory(str(_SCRIPTS))
    head = scripts.get_current_head()
    found = _revision(engine)
    if found is not None and found not in {step.revision for step in scripts.walk_revisions()}:
        raise unusable(
            engine.url,
            f"a newer version of this program has made it (tables {found})",
            remedy="Install that version again, or restore the copy from before its first start.",
        )
    if found != head:
        is_new = found is None and not inspect(engine).has_table(_FIRST_TABLE)
        _run_steps(engine)
        if is_new:
            logger.info("created the registry, version %s", head)
        else:
            logger.info("migrated the registry from %s to %s", found or "before the versions", head)
    _check_columns(engine)


def is_made(engine: Engine) -> bool:
    """Whether a registry's tables are there, of whatever version.

    Raises:
        SQLAlchemyError: The database cannot be asked.
    """
    return _revision(engine) is not None


def is_current(engine: Engine) -> bool:
    """Whether there is nothing to migrate.

    Raises:
        SQLAlchemyError: The database cannot be asked.
    """
    return _revision(engine) == ScriptDirectory(str(_SCRIPTS)).get_current_head()


def _revision(engine: Engine) -> str | None:
    options = {"version_table": VERSION_TABLE}
    with engine.connect() as connection:
        heads = MigrationContext.configure(connection, opts=options).get_current_heads()
    return ", ".join(heads) or None


def _run_steps(engine: Engine) -> None:
    with engine.connect() as connection:
        # Closed at the end, since it has forgotten how to check references.
        connection.detach()
        if engine.dialect.name == "sqlite":
            # References are off as long as a table is replaced; this must precede BEGIN, which in
            # turn must precede the first change: the driver would commit those one by one.
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        _upgrade(connection)
        connection.commit()


def _check_columns(engine: Engine) -> None:
    found = inspect(engine)
    for table in Base.metadata.sorted_tables:
        there = found.get_columns(table.name) if found.has_table(table.name) else []
        missing = set(table.columns.keys()) - {column["name"] for column in there}
        if missing:
            raise unusable(engine.url, f"its table {table.name} lacks {', '.join(sorted(missing))}")


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes |= {"connection": connection, "version_table": VERSION_TABLE}
    with _ALEMBIC:
        command.upgrade(config, "head")
