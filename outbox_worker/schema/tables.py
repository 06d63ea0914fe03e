"""Defines the seven tables for SQLAlchemy, with the names from the settings.

The key of a column is its name in docs/reference/tables.md, for example ``tables.payments.c.student_id``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    MetaData,
    Numeric,
    Table,
    Text,
    column,
    literal_column,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import CHAR, JSONB, UUID
from sqlalchemy.types import TypeEngine

from outbox_worker.keys import KeyKind
from outbox_worker.mapping import PAYLOAD_PATHS, PayloadPaths, StatusValues, TypeNames, all_status_values
from outbox_worker.model import COLUMNS
from outbox_worker.schema.ids import KEY_TYPES, UUIDS, PairIds, SameId
from outbox_worker.settings import Settings

PAIR_INDEX = "purchases_active_student_course_key"
"""The name of the unique index that prevents a second active purchase of a student for the same course.

The optional migration branch ``unique_index`` builds this index.
"""

PAIR_LOOKUP_INDEX = "purchases_active_student_course_idx"
"""The name of the plain index that finds purchases by student and course.

The worker needs this index only if no unique index exists.
"""

OWNED = "purchase-outbox-worker: created by its migrations"
"""The comment on tables that the migrations created.

A table is adopted if it lacks this comment and ``OWNERSHIP_LIST`` does not contain its name. The
migrations never alter or drop an adopted table.
"""

OWNERSHIP_LIST = "outbox_worker_tables"
"""The name of the table that lists all tables created by the migrations.

This list is in the same schema as the version table. After a restore without comments, only this list shows which
tables the migrations created.
"""

NOTIFY_CHANNEL = "outbox_worker"
"""The channel to which the trigger of the optional migration ``notify`` sends notifications.

The payload of a notification is the schema and the name of the outbox table.
"""

NOTIFY_TRIGGER = "outbox_worker_notify"
"""The name of the trigger and of the function that the optional migration ``notify`` creates."""

PAYMENT_KEYS = (
    ("payments", "id"),
    ("purchases", "payment_id"),
    ("processed_events", "payment_id"),
    ("dead_letters", "payment_id"),
)
"""The role and the key of each column that contains ids of payments."""

EVENT_KEYS = (("outbox", "event_id"), ("processed_events", "event_id"), ("dead_letters", "event_id"))
"""The role and the key of each column that contains ids of events."""

STATUS_VALUES = "status_values"
"""The key in the ``info`` of the column ``payments.status``.

The value maps each status to its texts in the database.
"""

TYPE_NAMES = "type_names"
"""The key in the ``info`` of the columns ``event_type`` in outbox and dead letters.

The value maps other names of event types to the worker's event types.
"""

_ID = UUID(as_uuid=True)
_TIME = DateTime(timezone=True)
_PAID = Numeric(12, 2)
_RECORDED = Numeric()
"""The type of the amounts that the worker writes: numeric without limits.

PostgreSQL never rounds an amount of this type.
"""
_NOW = text("clock_timestamp()")
_RANDOM_ID = text("gen_random_uuid()")
_ORDERED_ID = text("uuidv7()")
"""The default for ids that grow with time.

Before PostgreSQL 18, the default is an expression with the same effect.
"""


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one database. Each table's field is named after the role of the table."""

    metadata: MetaData
    payments: Table
    outbox: Table
    purchases: Table
    processed_events: Table
    dead_letters: Table
    workers: Table
    backfill_runs: Table
    ids: PairIds = UUIDS
    """The rules that say when ids in payments and purchases are the same.

    ``requirements.check_schema`` reads these rules from the database.
    """

    paths: PayloadPaths = PAYLOAD_PATHS
    """The paths in the payloads of events to the values that the worker reads."""
    payment_key: KeyKind = KeyKind.UUID
    """The kind of payment ids in all tables: uuid, integer or text.

    ``requirements.check_schema`` reads the kind from the database.
    """
    event_key: KeyKind = KeyKind.UUID
    """The kind of event ids in all tables: uuid, integer or text."""

    def with_documents(self, kind: TypeEngine[Any]) -> Tables:
        """Return a copy of these tables in which ``outbox.payload`` has another type: json or text."""
        return self._with_types({("outbox", "payload"): kind})

    def with_keys(self, payment: KeyKind, event: KeyKind) -> Tables:
        """Return a copy of these tables with these kinds of payment ids and event ids."""
        if (payment, event) == (self.payment_key, self.event_key):
            return self
        types = dict.fromkeys(PAYMENT_KEYS, KEY_TYPES[payment]) | dict.fromkeys(EVENT_KEYS, KEY_TYPES[event])
        return replace(self._with_types(types), payment_key=payment, event_key=event)

    def _with_types(self, types: Mapping[tuple[str, str], TypeEngine[Any]]) -> Tables:
        """Return a copy of these tables with other column types.

        ``types`` maps the role and the key of a column to the new type.
        """
        metadata = MetaData(info=self.metadata.info)
        copies = {role: getattr(self, role).to_metadata(metadata) for role in dict.fromkeys(role for role, _ in types)}
        for (role, key), kind in types.items():
            copies[role].c[key].type = kind
        return replace(self, **copies)

    def with_ids(self, ids: Mapping[str, SameId]) -> Tables:
        """Return a copy of these tables with the rules for comparing ids in this database."""
        return replace(self, ids=replace(self.ids, **ids))

    def by_role(self) -> dict[str, Table]:
        return {role: getattr(self, role) for role in COLUMNS}


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of one table and its columns in the user's database."""

    settings: Settings
    role: str

    @property
    def table(self) -> str:
        return self.settings.tables.get(self.role, self.role).rpartition(".")[2]

    @property
    def schema(self) -> str:
        """The schema of the table. A configured name can contain a schema: ``billing.payment``."""
        return self.settings.tables.get(self.role, "").rpartition(".")[0] or self.settings.schema_name

    def column(self, key: str) -> str:
        return self.settings.columns.get(f"{self.role}.{key}", key)


@dataclass(frozen=True, slots=True)
class _Builder:
    metadata: MetaData
    naming: Naming

    def column(self, key: str, *type_and_more: Any, nullable: bool = False, **options: Any) -> Column[Any]:
        return Column(self.naming.column(key), *type_and_more, key=key, nullable=nullable, **options)

    def one_of(self, key: str, *values: str) -> CheckConstraint:
        listed: list[Any] = [literal_column(f"'{value}'") for value in values]
        return CheckConstraint(column(self.naming.column(key)).in_(listed), name=f"{self.naming.table}_{key}_check")

    def table(self, *parts: Any) -> Table:
        return Table(self.naming.table, self.metadata, *parts, schema=self.naming.schema)


def by_column(table: Table, values: Mapping[str, Any]) -> dict[Any, Any]:
    """Replace column keys by columns. SQLAlchemy's INSERT and UPDATE need columns."""
    return {table.c[key]: value for key, value in values.items()}


def build_tables(settings: Settings) -> Tables:
    """Build the tables with the names from ``settings``. This function does not use the database."""
    metadata = MetaData()
    metadata.info[OWNERSHIP_LIST] = _ownership_list(metadata, settings.schema_name)
    builders = {role: _Builder(metadata, Naming(settings, role)) for role in COLUMNS}
    return Tables(
        metadata,
        payments=_payments(builders["payments"], all_status_values(settings.payments.status_values)),
        outbox=_outbox(builders["outbox"], settings.outbox.types),
        purchases=_purchases(builders["purchases"]),
        processed_events=_processed_events(builders["processed_events"]),
        dead_letters=_dead_letters(builders["dead_letters"], settings.outbox.types),
        workers=_workers(builders["workers"]),
        backfill_runs=_backfill_runs(builders["backfill_runs"]),
        paths=settings.outbox.payload,
    )


def ownership_list(table: Table) -> Table:
    """Return the table ``OWNERSHIP_LIST`` that was built together with ``table``."""
    listed: Table = table.metadata.info[OWNERSHIP_LIST]
    return listed


def _ownership_list(metadata: MetaData, schema: str) -> Table:
    names = (Column(key, Text, primary_key=True) for key in ("table_schema", "table_name"))
    return Table(OWNERSHIP_LIST, metadata, *names, schema=schema)


def _payments(b: _Builder, statuses: StatusValues) -> Table:
    return b.table(
        b.column("id", _ID, primary_key=True, server_default=_RANDOM_ID),
        b.column("student_id", _ID),
        b.column("course_id", _ID),
        b.column("amount", _PAID),
        b.column("currency", CHAR(3)),
        b.column("status", Text, info={STATUS_VALUES: statuses}),
        b.column("created_at", _TIME, server_default=_NOW),
        b.column("updated_at", _TIME, server_default=_NOW),
        b.one_of("status", *(text for texts in statuses.values() for text in texts)),
    )


def _outbox(b: _Builder, names: TypeNames) -> Table:
    table = b.table(
        b.column("id", BigInteger, Identity(), primary_key=True),
        b.column("event_id", _ID, unique=True),
        b.column("event_type", Text, info={TYPE_NAMES: names}),
        b.column("payload", JSONB),
        b.column("headers", JSONB, nullable=True),
        b.column("created_at", _TIME, server_default=_NOW),
        b.column("due_at", _TIME, server_default=_NOW),
        b.column("attempts", Integer, server_default=text("0")),
        b.column("crashes", Integer, server_default=text("0")),
        b.column("last_error", Text, nullable=True),
    )
    Index(f"{table.name}_due_idx", table.c.due_at, table.c.id)
    return table


def _purchases(b: _Builder) -> Table:
    """Build the table without an index on student and course.

    A migration builds either a unique index or a plain index on these columns.
    """
    return b.table(
        b.column("id", _ID, primary_key=True, server_default=_ORDERED_ID),
        b.column("student_id", _ID),
        b.column("course_id", _ID),
        b.column("payment_id", _ID, nullable=True, unique=True),
        b.column("amount", _RECORDED),
        b.column("currency", CHAR(3)),
        b.column("is_active", Boolean, server_default=text("true")),
        b.column("created_at", _TIME, server_default=_NOW),
        b.column("deactivated_at", _TIME, nullable=True),
    )


def _processed_events(b: _Builder) -> Table:
    return b.table(
        b.column("event_id", _ID, primary_key=True),
        b.column("event_type", Text),
        b.column("outcome", Text),
        b.column("payment_id", _ID, nullable=True),
        b.column("processed_at", _TIME, server_default=_NOW),
        b.column("recovered_at", _TIME, nullable=True),
    )


def _dead_letters(b: _Builder, names: TypeNames) -> Table:
    table = b.table(
        b.column("event_id", _ID, primary_key=True),
        b.column("event_type", Text, info={TYPE_NAMES: names}),
        b.column("payload", JSONB),
        b.column("headers", JSONB, nullable=True),
        b.column("created_at", _TIME),
        b.column("payment_id", _ID, nullable=True),
        b.column("attempts", Integer),
        b.column("reason", Text),
        b.column("detail", Text),
        b.column("dead_at", _TIME, server_default=_NOW),
        b.column("state", Text, server_default=text("'open'")),
        b.column("resolved_at", _TIME, nullable=True),
        b.column("actor", Text, nullable=True),
        b.column("note", Text, nullable=True),
        b.one_of("state", "open", "requeued", "discarded", "settled"),
    )
    is_open = table.c.state == literal_column("'open'")
    Index(f"{table.name}_open_idx", table.c.dead_at, table.c.event_id, postgresql_where=is_open)
    Index(f"{table.name}_payment_idx", table.c.payment_id)
    return table


def _workers(b: _Builder) -> Table:
    return b.table(
        b.column("id", _ID, primary_key=True),
        b.column("host", Text),
        b.column("pid", Integer),
        b.column("version", Text),
        b.column("started_at", _TIME, server_default=_NOW),
        b.column("seen_at", _TIME, server_default=_NOW),
        b.column("stopped_at", _TIME, nullable=True),
        b.column("guard", Text),
        b.column("metrics", JSONB, server_default=text("'{}'")),
        b.column("succeeded_at", _TIME, nullable=True),
        b.column("isolated_event", BigInteger, nullable=True),
        b.column("isolated_at", _TIME, nullable=True),
        b.column("isolated_timeline", Text, nullable=True),
        b.column("set_aside", JSONB, server_default=text("'{}'")),
    )


def _backfill_runs(b: _Builder) -> Table:
    return b.table(
        b.column("id", _ID, primary_key=True),
        b.column("kind", Text),
        b.column("started_at", _TIME, server_default=_NOW),
        b.column("seen_at", _TIME, server_default=_NOW),
        b.column("finished_at", _TIME, nullable=True),
        b.column("since", _TIME, nullable=True),
        b.column("until", _TIME, nullable=True),
        b.column("cutoff", _TIME),
        b.column("is_full", Boolean),
        b.column("cursor", JSONB, nullable=True),
        b.column("counts", JSONB, server_default=text("'{}'")),
        b.column("host", Text),
        b.column("pid", Integer),
        b.column("actor", Text),
        b.column("reason", Text, nullable=True),
        b.column("outcome", Text, nullable=True),
        b.one_of("kind", "operator", "periodic"),
    )


def relation_name(table: Table) -> str:
    """Return the qualified name of a table for SQL and ``to_regclass``, quoted if needed."""
    return postgresql.dialect().identifier_preparer.format_table(table)  # type: ignore[no-untyped-call]


def quoted(name: str) -> str:
    """Return a name for SQL, quoted if needed."""
    return postgresql.dialect().identifier_preparer.quote(name)  # type: ignore[no-untyped-call]
