"""Create the table ``backfill_runs``.

The table stores the result of each backfill, and the position where the next backfill continues.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from naming import TableNaming

revision = "core_0003"
down_revision = "core_0002"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    """Create the table if it is missing."""
    naming: TableNaming = context.config.attributes["naming"].of("backfill_runs")
    c, inspector = naming.column, sa.inspect(op.get_bind())
    if inspector.has_table(naming.table, schema=naming.schema):
        return
    if naming.schema not in inspector.get_schema_names():
        op.execute(sa.schema.CreateSchema(naming.schema))
    kinds: list[Any] = [sa.literal_column("'operator'"), sa.literal_column("'periodic'")]
    op.create_table(
        naming.table,
        sa.Column(c("id"), postgresql.UUID(), primary_key=True),
        sa.Column(c("kind"), sa.Text, nullable=False),
        sa.Column(c("started_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("seen_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("finished_at"), TIME),
        sa.Column(c("since"), TIME),
        sa.Column(c("until"), TIME),
        sa.Column(c("cutoff"), TIME, nullable=False),
        sa.Column(c("is_full"), sa.Boolean, nullable=False),
        sa.Column(c("cursor"), postgresql.JSONB),
        sa.Column(c("counts"), postgresql.JSONB, nullable=False, server_default=sa.text("'{}'")),
        sa.Column(c("host"), sa.Text, nullable=False),
        sa.Column(c("pid"), sa.Integer, nullable=False),
        sa.Column(c("actor"), sa.Text, nullable=False),
        sa.Column(c("reason"), sa.Text),
        sa.Column(c("outcome"), sa.Text),
        sa.CheckConstraint(sa.column(c("kind")).in_(kinds), name=f"{naming.table}_kind_check"),
        schema=naming.schema,
        comment=naming.owned,
    )


def downgrade() -> None:
    """Drop the table if our migrations created the table and the table is empty."""
    naming: TableNaming = context.config.attributes["naming"].of("backfill_runs")
    table = sa.table(naming.table, schema=naming.schema)
    if naming.is_owned(op.get_bind()) and not op.get_bind().scalar(sa.select(sa.exists().select_from(table))):
        op.drop_table(naming.table, schema=naming.schema)
