"""Aliases, pins and keep-alives of models, why their donor was chosen, bases, idempotency keys.

A transaction checks donors when it ends, so that it may delete one before its dependants move.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# What PostgreSQL calls a reference that nobody named; SQLite lets it have no name.
_NAMES = {"fk": "%(table_name)s_%(column_0_name)s_fkey"}


def upgrade() -> None:
    """Adds the columns and tables; SQLite copies the models into a new table for that."""
    with op.batch_alter_table("models", naming_convention=_NAMES) as models:
        models.add_column(sa.Column("alias", sa.String()))
        models.add_column(
            sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false())
        )
        models.add_column(sa.Column("keep_alive_s", sa.Double()))
        models.add_column(sa.Column("donor_choice", sa.JSON()))
        models.create_unique_constraint("models_alias_key", ["alias"])
        models.drop_constraint("models_donor_fkey", type_="foreignkey")
        models.create_foreign_key(
            "models_donor_fkey",
            "models",
            ["donor"],
            ["name"],
            deferrable=True,
            initially="DEFERRED",
        )
    op.create_table(
        "bases",
        sa.Column("fingerprint", sa.String(), primary_key=True),
        sa.Column("source", sa.String(), nullable=False),
    )
    op.create_table(
        "replays",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("job", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False, index=True),
    )
