"""The first tables: models, scans, tunings and jobs.

Registries older than the migrations have them without a version; theirs are taken over as they are.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from server.registry.refusal import unusable

revision = "0001"
down_revision = None

_TABLES = sa.MetaData()
_WORD = sa.String(16)

sa.Table(
    "models",
    _TABLES,
    sa.Column("name", sa.String(), primary_key=True),
    sa.Column("source", sa.String(), nullable=False),
    sa.Column("request", sa.JSON(), nullable=False),
    sa.Column("state", _WORD, nullable=False, index=True),
    sa.Column("position", sa.Integer(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Column("donor", sa.String(), sa.ForeignKey("models.name", name="models_donor_fkey")),
    sa.Column("family", sa.String()),
    sa.Column("fingerprint", sa.String()),
    sa.Column("plan", sa.JSON()),
    sa.Column("error", sa.JSON()),
    sa.Column("last_used_at", sa.Double()),
    sa.Column("max_model_len", sa.Integer()),
)
sa.Table(
    "scans",
    _TABLES,
    sa.Column("donor_fingerprint", sa.String(), primary_key=True),
    sa.Column("variant_fingerprint", sa.String(), primary_key=True),
    sa.Column("report", sa.JSON(), nullable=False),
)
sa.Table(
    "tunings",
    _TABLES,
    sa.Column("donor_fingerprint", sa.String(), primary_key=True),
    sa.Column("variant_fingerprint", sa.String(), primary_key=True),
    sa.Column("key", sa.String(), primary_key=True),
    sa.Column("saved_at", sa.Double(), nullable=False),
    sa.Column("result", sa.JSON(), nullable=False),
)
sa.Table(
    "jobs",
    _TABLES,
    sa.Column("id", sa.String(), primary_key=True),
    sa.Column("model", sa.String(), nullable=False, index=True),
    sa.Column("request", sa.JSON(), nullable=False),
    sa.Column("status", _WORD, nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Column("stage", _WORD, nullable=False),
    sa.Column("done_bytes", sa.BigInteger(), nullable=False),
    sa.Column("total_bytes", sa.BigInteger(), nullable=False),
    sa.Column("error", sa.JSON()),
    sa.Column("result", sa.JSON()),
    sa.Column("finished_at", sa.Double()),
)


def upgrade() -> None:
    """Creates the tables that are not there yet.

    Raises:
        InvalidRequestError: Another program has tables of these names there.
    """
    connection = op.get_bind()
    found = sa.inspect(connection)
    for table in _TABLES.sorted_tables:
        if found.has_table(table.name):
            columns = {column["name"] for column in found.get_columns(table.name)}
            if columns != set(table.columns.keys()):
                raise unusable(
                    connection.engine.url,
                    f"its table {table.name} is not one of ours",
                    remedy="Give the registry a database of its own.",
                )
    _TABLES.create_all(connection)
