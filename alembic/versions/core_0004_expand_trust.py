"""Add columns to ``workers`` that name the event that a worker processes alone.

Other workers read these columns. Another new column contains the events that a worker has set
aside. No worker claims an event that is set aside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from naming import TableNaming

revision = "core_0004"
down_revision = "core_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns only to our own table.

    Workers of earlier versions ignore the columns, and can continue to run.
    """
    naming: TableNaming = context.config.attributes["naming"].of("workers")
    present = {each["name"] for each in sa.inspect(op.get_bind()).get_columns(naming.table, schema=naming.schema)}
    if not naming.is_owned(op.get_bind()):
        return
    for column in (
        sa.Column(naming.column("isolated_event"), sa.BigInteger),
        sa.Column(naming.column("isolated_at"), sa.DateTime(timezone=True)),
        sa.Column(naming.column("isolated_timeline"), sa.Text),
        sa.Column(naming.column("set_aside"), postgresql.JSONB, nullable=False, server_default=sa.text("'{}'")),
    ):
        if column.name not in present:
            op.add_column(naming.table, column, schema=naming.schema)


def downgrade() -> None:
    """Keep the columns. Earlier versions ignore the columns.

    ``core_0001`` drops the table if the table is empty.
    """
