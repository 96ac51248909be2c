"""Studies of families' weights, and what they have found tensor by tensor."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the tables."""
    op.create_table(
        "studies",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("family", sa.String(), nullable=False),
        sa.Column("base", sa.JSON(), nullable=False),
        sa.Column("variants", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("num_tensors", sa.Integer()),
        sa.Column("summary", sa.JSON()),
        sa.Column("finished_at", sa.Double()),
    )
    op.create_table(
        "study_tensors",
        sa.Column("study", sa.String(64), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("record", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("study", "name"),
        sa.ForeignKeyConstraint(
            ["study"], ["studies.key"], name="study_tensors_study_fkey", ondelete="CASCADE"
        ),
    )
