"""Create the missing tables. Do not alter tables that another application created."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from naming import TableNaming

revision = "core_0001"
down_revision = None
branch_labels = ("core",)
depends_on = None

ID = postgresql.UUID()
TIME = sa.DateTime(timezone=True)
MONEY = sa.Numeric(12, 2)
NOW = sa.text("clock_timestamp()")
RANDOM_ID = sa.text("gen_random_uuid()")

# what: the type of a column, and the collation if it is not the default of the type · lock: none
# index: the catalogue's indexes
TYPE_AS_WRITTEN = sa.text(
    """
    SELECT format_type(a.atttypid, a.atttypmod)
           || coalesce(' COLLATE ' || quote_ident(n.nspname) || '.' || quote_ident(c.collname), '')
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_collation c ON c.oid = a.attcollation AND a.attcollation <> t.typcollation
    LEFT JOIN pg_namespace n ON n.oid = c.collnamespace
    WHERE a.attrelid = to_regclass(:relation) AND a.attname = :column AND NOT a.attisdropped
    """
)

# what: the type that our tables give to ids of payments or events: uuid, bigint, or text with the collation of the ids
# lock: none · index: the catalogue's indexes
TYPE_OF_KEY = sa.text(
    """
    WITH RECURSIVE up (oid, collated) AS (
        SELECT a.atttypid, a.attcollation FROM pg_attribute a
        WHERE a.attrelid = to_regclass(:relation) AND a.attname = :column AND NOT a.attisdropped
        UNION ALL
        SELECT t.typbasetype, up.collated FROM up JOIN pg_type t ON t.oid = up.oid WHERE t.typtype = 'd')
    SELECT CASE WHEN t.typname IN ('int2', 'int4', 'int8') THEN 'bigint'
                WHEN t.typname IN ('text', 'varchar') THEN
                     'text' || coalesce(' COLLATE ' || quote_ident(n.nspname) || '.' || quote_ident(c.collname), '')
                ELSE 'uuid' END
    FROM up JOIN pg_type t ON t.oid = up.oid
    LEFT JOIN pg_collation c ON c.oid = up.collated AND up.collated <> t.typcollation
    LEFT JOIN pg_namespace n ON n.oid = c.collnamespace
    WHERE t.typtype <> 'd'
    """
)


def upgrade() -> None:
    _create_schemas()
    for role, make in MAKERS.items():
        naming: TableNaming = context.config.attributes["naming"].of(role)
        if not sa.inspect(op.get_bind()).has_table(naming.table, schema=naming.schema):
            make(naming)


def downgrade() -> None:
    """Drop the tables that our migrations created, if they are empty."""
    for role in reversed(MAKERS):
        naming: TableNaming = context.config.attributes["naming"].of(role)
        table = sa.table(naming.table, schema=naming.schema)
        if naming.is_owned(op.get_bind()) and not op.get_bind().scalar(sa.select(sa.exists().select_from(table))):
            op.drop_table(naming.table, schema=naming.schema)


def _create_schemas() -> None:
    wanted = {context.config.attributes["naming"].of(role).schema for role in MAKERS}
    for schema in sorted(wanted - set(sa.inspect(op.get_bind()).get_schema_names())):
        op.execute(sa.schema.CreateSchema(schema))


def _create(naming: TableNaming, *columns: sa.Column[Any], **checks: tuple[str, ...]) -> None:
    constraints = [
        sa.CheckConstraint(
            sa.column(naming.column(key)).in_([sa.literal_column(f"'{value}'") for value in values]),
            name=f"{naming.table}_{key}_check",
        )
        for key, values in checks.items()
    ]
    op.create_table(naming.table, *columns, *constraints, schema=naming.schema, comment=naming.owned)


def _index(naming: TableNaming, suffix: str, *keys: str, where: sa.ColumnElement[bool] | None = None) -> None:
    op.create_index(
        f"{naming.table}_{suffix}",
        naming.table,
        [naming.column(key) for key in keys],
        schema=naming.schema,
        postgresql_where=where,
    )


def _payments(naming: TableNaming) -> None:
    c = naming.column
    _create(
        naming,
        sa.Column(c("id"), ID, primary_key=True, server_default=RANDOM_ID),
        sa.Column(c("student_id"), ID, nullable=False),
        sa.Column(c("course_id"), ID, nullable=False),
        sa.Column(c("amount"), MONEY, nullable=False),
        sa.Column(c("currency"), sa.CHAR(3), nullable=False),
        sa.Column(c("status"), sa.Text, nullable=False),
        sa.Column(c("created_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("updated_at"), TIME, nullable=False, server_default=NOW),
        status=("pending", "succeeded", "failed", "refunded"),
    )


def _outbox(naming: TableNaming) -> None:
    c = naming.column
    _create(
        naming,
        sa.Column(c("id"), sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column(c("event_id"), ID, nullable=False, unique=True),
        sa.Column(c("event_type"), sa.Text, nullable=False),
        sa.Column(c("payload"), postgresql.JSONB, nullable=False),
        sa.Column(c("headers"), postgresql.JSONB),
        sa.Column(c("created_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("due_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("attempts"), sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column(c("crashes"), sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column(c("last_error"), sa.Text),
    )
    _index(naming, "due_idx", "due_at", "id")


def _purchases(naming: TableNaming) -> None:
    c = naming.column
    _create(
        naming,
        sa.Column(c("id"), ID, primary_key=True, server_default=RANDOM_ID),
        sa.Column(c("student_id"), _type_in_payments("student_id"), nullable=False),
        sa.Column(c("course_id"), _type_in_payments("course_id"), nullable=False),
        sa.Column(c("payment_id"), _type_of_key("payments", "id"), unique=True),
        sa.Column(c("amount"), MONEY, nullable=False),
        sa.Column(c("currency"), sa.CHAR(3), nullable=False),
        sa.Column(c("is_active"), sa.Boolean, nullable=False, server_default=sa.true()),
        sa.Column(c("created_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("deactivated_at"), TIME),
    )
    op.create_index(
        naming.pair_lookup_index,
        naming.table,
        [c("student_id"), c("course_id")],
        schema=naming.schema,
        postgresql_where=sa.column(c("is_active")),
    )


class _TypeAsWritten(sa.types.UserDefinedType[Any]):
    """A column type in the form that PostgreSQL's catalogue prints, with schema and collation."""

    cache_ok = True

    def __init__(self, written: str) -> None:
        self.written = written

    def get_col_spec(self, **_: object) -> str:
        return self.written


def _type_in_payments(key: str) -> _TypeAsWritten:
    """Return the type of this column in payments. The column gets the same type in purchases.

    The worker compares the two columns. Their types must therefore be equal. In a payments table of
    another application, the ids can be numbers. The type or the collation can be from another
    schema.
    """
    naming: TableNaming = context.config.attributes["naming"].of("payments")
    asked = {"relation": naming.relation, "column": naming.column(key)}
    return _TypeAsWritten(op.get_bind().execute(TYPE_AS_WRITTEN, asked).scalar_one())


def _type_of_key(role: str, key: str) -> _TypeAsWritten:
    """Return the type for columns with copies of the ids in this column."""
    naming: TableNaming = context.config.attributes["naming"].of(role)
    asked = {"relation": naming.relation, "column": naming.column(key)}
    return _TypeAsWritten(op.get_bind().execute(TYPE_OF_KEY, asked).scalar() or "uuid")


def _processed_events(naming: TableNaming) -> None:
    c = naming.column
    _create(
        naming,
        sa.Column(c("event_id"), _type_of_key("outbox", "event_id"), primary_key=True),
        sa.Column(c("event_type"), sa.Text, nullable=False),
        sa.Column(c("outcome"), sa.Text, nullable=False),
        sa.Column(c("payment_id"), _type_of_key("payments", "id")),
        sa.Column(c("processed_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("recovered_at"), TIME),
    )


def _dead_letters(naming: TableNaming) -> None:
    c = naming.column
    _create(
        naming,
        sa.Column(c("event_id"), _type_of_key("outbox", "event_id"), primary_key=True),
        sa.Column(c("event_type"), sa.Text, nullable=False),
        sa.Column(c("payload"), postgresql.JSONB, nullable=False),
        sa.Column(c("headers"), postgresql.JSONB),
        sa.Column(c("created_at"), TIME, nullable=False),
        sa.Column(c("payment_id"), _type_of_key("payments", "id")),
        sa.Column(c("attempts"), sa.Integer, nullable=False),
        sa.Column(c("reason"), sa.Text, nullable=False),
        sa.Column(c("detail"), sa.Text, nullable=False),
        sa.Column(c("dead_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("state"), sa.Text, nullable=False, server_default=sa.text("'open'")),
        sa.Column(c("resolved_at"), TIME),
        sa.Column(c("actor"), sa.Text),
        sa.Column(c("note"), sa.Text),
        state=("open", "requeued", "discarded", "settled"),
    )
    _index(naming, "open_idx", "dead_at", "event_id", where=sa.column(c("state")) == sa.literal_column("'open'"))
    _index(naming, "payment_idx", "payment_id")


def _workers(naming: TableNaming) -> None:
    c = naming.column
    _create(
        naming,
        sa.Column(c("id"), ID, primary_key=True),
        sa.Column(c("host"), sa.Text, nullable=False),
        sa.Column(c("pid"), sa.Integer, nullable=False),
        sa.Column(c("version"), sa.Text, nullable=False),
        sa.Column(c("started_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("seen_at"), TIME, nullable=False, server_default=NOW),
        sa.Column(c("stopped_at"), TIME),
        sa.Column(c("guard"), sa.Text, nullable=False),
        sa.Column(c("metrics"), postgresql.JSONB, nullable=False, server_default=sa.text("'{}'")),
    )


MAKERS = {
    "payments": _payments,
    "outbox": _outbox,
    "purchases": _purchases,
    "processed_events": _processed_events,
    "dead_letters": _dead_letters,
    "workers": _workers,
}
