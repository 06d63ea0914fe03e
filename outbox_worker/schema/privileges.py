"""Which privileges each role needs, by table and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Table, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from outbox_worker.model import COLUMNS
from outbox_worker.schema.tables import relation_name

Privileges = Mapping[str, Mapping[str, tuple[str, ...]]]
"""By the table's role, what must be allowed there, and on which columns, by their keys (none: on the table)."""

_WHOLE: tuple[str, ...] = ()

_OF_PAYMENTS = ("id", "student_id", "course_id", "amount", "currency", "status", "created_at")

_OF_MARKS = ("outcome", "payment_id", "recovered_at")

_OF_RUNS = ("seen_at", "finished_at", "cursor", "counts", "host", "pid", "outcome")

_OF_BURIED = ("event_type", "payload", "headers", "created_at", "payment_id", "attempts", "reason", "detail", "dead_at")

_OF_RESOLVED = ("state", "resolved_at")

STRUCTURE: Privileges = {role: {} for role in COLUMNS}
"""For a look at tables and columns alone."""


def reading(*roles: str) -> Privileges:
    """What it takes to read these tables."""
    return {role: {"SELECT": _OF_PAYMENTS if role == "payments" else _WHOLE} for role in roles}


READING: Privileges = reading(*COLUMNS)
"""What a role that reads all tables needs: `status`."""

EXPLAINING: Privileges = reading("payments", "outbox", "purchases", "processed_events", "dead_letters")
"""What a role needs to class and explain payments: `audit`, `why`, `backfill --dry-run`."""

PRIVILEGES: Privileges = {
    "payments": READING["payments"],
    "outbox": {"SELECT": _WHOLE, "UPDATE": ("due_at", "attempts", "crashes", "last_error"), "DELETE": _WHOLE},
    "purchases": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": ("is_active", "deactivated_at")},
    "processed_events": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": _OF_MARKS},
    "dead_letters": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": (*_OF_BURIED, *_OF_RESOLVED)},
    "workers": {
        "SELECT": _WHOLE,
        "INSERT": _WHOLE,
        "UPDATE": ("seen_at", "stopped_at", "guard", "metrics", "succeeded_at"),
        "DELETE": _WHOLE,
    },
    "backfill_runs": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": _OF_RUNS, "DELETE": _WHOLE},
}
"""What the role of a worker must be allowed."""

DECIDING: Privileges = {
    "payments": READING["payments"],
    "outbox": {"SELECT": _WHOLE, "INSERT": _WHOLE},
    "purchases": READING["purchases"],
    "dead_letters": {"SELECT": _WHOLE, "UPDATE": (*_OF_RESOLVED, "actor", "note")},
}
"""What the role of somebody who requeues and discards must be allowed."""

BACKFILLING: Privileges = {
    "payments": READING["payments"],
    "outbox": {"SELECT": _WHOLE},
    "purchases": {"SELECT": _WHOLE, "INSERT": _WHOLE},
    "processed_events": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": _OF_MARKS},
    "dead_letters": {"SELECT": _WHOLE, "UPDATE": _OF_RESOLVED},
    "backfill_runs": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": _OF_RUNS},
}
"""What the role of somebody who backfills by hand must be allowed."""

# what: whether something is allowed on a table, or, where that may be granted by column, on all of some columns or,
# where none are named, on any · lock: none · index: the catalogue's own
_ALLOWED = text(
    """
    SELECT CASE
        WHEN has_table_privilege(to_regclass(:name), :privilege) THEN true
        WHEN :privilege = 'DELETE' THEN false
        WHEN cardinality(CAST(:columns AS text[])) = 0 THEN has_any_column_privilege(to_regclass(:name), :privilege)
        ELSE (SELECT bool_and(has_column_privilege(attrelid, attnum, :privilege)) FROM pg_attribute
              WHERE attrelid = to_regclass(:name) AND attname = ANY(CAST(:columns AS text[])))
    END
    """
)

# what: those of some schemas that exist and may not be used · lock: none · index: the catalogue's own
CLOSED_SCHEMAS = text(
    "SELECT CAST(nspname AS text) FROM pg_namespace"
    " WHERE nspname = ANY(CAST(:schemas AS text[])) AND NOT has_schema_privilege(oid, 'USAGE')"
)


def in_grant(table: Table, privilege: str, keys: Sequence[str]) -> str:
    quote = postgresql.dialect().identifier_preparer.quote  # type: ignore[no-untyped-call]
    return f"{privilege} ({', '.join(quote(table.c[key].name) for key in keys)})" if keys else privilege


def may(session: Session, table: Table, privilege: str, keys: Sequence[str]) -> bool:
    """Columns that are not there are another finding."""
    columns = [table.c[key].name for key in keys]
    asked = {"name": relation_name(table), "privilege": privilege, "columns": columns}
    return session.scalar(_ALLOWED, asked) is not False
