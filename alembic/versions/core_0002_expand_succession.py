"""Note beside a worker that fell silent that its successor went carefully over what it may have died of."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

from outbox_worker.schema.catalogue import is_owned
from outbox_worker.schema.tables import build_tables

revision = "core_0002"
down_revision = "core_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """An adopted table is left as it is; where the column is missing, ``migrate`` says so."""
    workers = build_tables(context.config.attributes["settings"]).workers
    column = workers.c.succeeded_at.name
    present = {each["name"] for each in sa.inspect(op.get_bind()).get_columns(workers.name, schema=workers.schema)}
    if is_owned(op.get_bind(), workers) and column not in present:
        op.add_column(workers.name, sa.Column(column, sa.DateTime(timezone=True)), schema=workers.schema)


def downgrade() -> None:
    """The column stays, nullable and in nobody's way; ``core_0001`` drops the table where it is empty."""
