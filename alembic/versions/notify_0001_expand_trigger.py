"""Tell listening workers of new events at the producers' COMMIT: a statement-level trigger, always optional."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

from outbox_worker.schema.tables import NOTIFY_CHANNEL, NOTIFY_TRIGGER, build_tables, relation_name

revision = "notify_0001"
down_revision = None
branch_labels = ("notify",)
depends_on = "core_0001"


def upgrade() -> None:
    outbox = build_tables(context.config.attributes["settings"]).outbox
    op.execute(
        f"""
        CREATE OR REPLACE FUNCTION {_function(outbox)}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_notify('{NOTIFY_CHANNEL}', TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME);
            RETURN NULL;
        END $$
        """
    )
    op.execute(
        f"CREATE OR REPLACE TRIGGER {NOTIFY_TRIGGER} AFTER INSERT ON {relation_name(outbox)}"
        f" FOR EACH STATEMENT EXECUTE FUNCTION {_function(outbox)}()"
    )


def downgrade() -> None:
    outbox = build_tables(context.config.attributes["settings"]).outbox
    if sa.inspect(op.get_bind()).has_table(outbox.name, schema=outbox.schema):
        op.execute(f"DROP TRIGGER IF EXISTS {NOTIFY_TRIGGER} ON {relation_name(outbox)}")
    op.execute(f"DROP FUNCTION IF EXISTS {_function(outbox)}()")


def _function(outbox: sa.Table) -> str:
    return f"{op.get_bind().dialect.identifier_preparer.quote_schema(outbox.schema)}.{NOTIFY_TRIGGER}"
