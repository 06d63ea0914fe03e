"""Create the table ``outbox_worker_tables`` for the list of tables that our migrations created.

Before this revision, only the comment on a table showed that our migrations had created the table.
A restore can lose the comments. After a restore without comments, the worker treated its own tables
as tables of another application.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from naming import TableNaming

revision = "core_0005"
down_revision = "core_0004"
branch_labels = None
depends_on = None

ROLES = ("payments", "outbox", "purchases", "processed_events", "dead_letters", "workers", "backfill_runs")


def upgrade() -> None:
    """Create the list, and insert every table that has our comment. Workers of earlier versions ignore the list."""
    tables: list[TableNaming] = [context.config.attributes["naming"].of(role) for role in ROLES]
    owned = [table for table in tables if table.is_owned(op.get_bind())]
    schema, name = tables[0].list_schema, tables[0].ownership_list
    if not sa.inspect(op.get_bind()).has_table(name, schema=schema):
        op.create_table(
            name,
            sa.Column("table_schema", sa.Text, primary_key=True),
            sa.Column("table_name", sa.Text, primary_key=True),
            schema=schema,
            comment=tables[0].owned,
        )
    listed = sa.table(name, sa.column("table_schema"), sa.column("table_name"), schema=schema)
    for table in owned:
        row = postgresql.insert(listed).values(table_schema=table.schema, table_name=table.table)
        op.execute(row.on_conflict_do_nothing())


def downgrade() -> None:
    """Write our comment on each listed table again, then drop the list.

    Earlier versions read only the comments.
    """
    tables: list[TableNaming] = [context.config.attributes["naming"].of(role) for role in ROLES]
    inspector = sa.inspect(op.get_bind())
    for table in tables:
        if inspector.has_table(table.table, schema=table.schema) and table.is_owned(op.get_bind()):
            op.create_table_comment(table.table, table.owned, schema=table.schema)
    op.execute(f"DROP TABLE IF EXISTS {tables[0].list_relation}")
