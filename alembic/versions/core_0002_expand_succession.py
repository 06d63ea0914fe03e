"""Add the column ``workers.succeeded_at``: the time when another worker took over the row of a dead worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from alembic import context, op

if TYPE_CHECKING:
    from naming import TableNaming

revision = "core_0002"
down_revision = "core_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column only to our own table.

    If an adopted table lacks the column, ``migrate`` reports the missing column.
    """
    naming: TableNaming = context.config.attributes["naming"].of("workers")
    column = naming.column("succeeded_at")
    present = {each["name"] for each in sa.inspect(op.get_bind()).get_columns(naming.table, schema=naming.schema)}
    if naming.is_owned(op.get_bind()) and column not in present:
        op.add_column(naming.table, sa.Column(column, sa.DateTime(timezone=True)), schema=naming.schema)


def downgrade() -> None:
    """Keep the column. The column can be NULL and does no harm.

    ``core_0001`` drops the table if the table is empty.
    """
