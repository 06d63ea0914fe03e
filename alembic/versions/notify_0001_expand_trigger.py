"""Create a trigger that notifies the workers if a producer commits new events.

This migration is optional.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from alembic import context, op

if TYPE_CHECKING:
    from naming import TableNaming

revision = "notify_0001"
down_revision = None
branch_labels = ("notify",)
depends_on = "core_0001"


def upgrade() -> None:
    outbox: TableNaming = context.config.attributes["naming"].of("outbox")
    op.execute(
        f"""
        CREATE OR REPLACE FUNCTION {_function(outbox)}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_notify('{outbox.notify_channel}', TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME);
            RETURN NULL;
        END $$
        """
    )
    op.execute(
        f"CREATE OR REPLACE TRIGGER {outbox.notify_trigger} AFTER INSERT ON {outbox.relation}"
        f" FOR EACH STATEMENT EXECUTE FUNCTION {_function(outbox)}()"
    )


def downgrade() -> None:
    outbox: TableNaming = context.config.attributes["naming"].of("outbox")
    if sa.inspect(op.get_bind()).has_table(outbox.table, schema=outbox.schema):
        op.execute(f"DROP TRIGGER IF EXISTS {outbox.notify_trigger} ON {outbox.relation}")
    op.execute(f"DROP FUNCTION IF EXISTS {_function(outbox)}()")


def _function(outbox: TableNaming) -> str:
    return f"{op.get_bind().dialect.identifier_preparer.quote_schema(outbox.schema)}.{outbox.notify_trigger}"
