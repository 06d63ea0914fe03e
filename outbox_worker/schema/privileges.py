"""Defines the privileges that each kind of user needs, by table and column."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum

from sqlalchemy import Table, text
from sqlalchemy.orm import Session

from outbox_worker.model import COLUMNS
from outbox_worker.schema.tables import quoted, relation_name

Privileges = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Maps each table to its needed privileges, and each privilege to the keys of its columns.

If a privilege has no keys, it covers the whole table.
"""

_WHOLE: tuple[str, ...] = ()

_OF_PAYMENTS = ("id", "student_id", "course_id", "amount", "currency", "status", "created_at")

_OF_MARKS = ("outcome", "payment_id", "recovered_at")

_OF_RUNS = ("seen_at", "finished_at", "cursor", "counts", "host", "pid", "outcome")

_OF_WORKERS = (
    *("seen_at", "stopped_at", "guard", "metrics", "succeeded_at"),
    *("isolated_event", "isolated_at", "isolated_timeline", "set_aside"),
)

_OF_BURIED = ("event_type", "payload", "headers", "created_at", "payment_id", "attempts", "reason", "detail", "dead_at")

_OF_RESOLVED = ("state", "resolved_at")

STRUCTURE: Privileges = {role: {} for role in COLUMNS}
"""The empty set of privileges, for a check of tables and columns only."""


def reading(*roles: str) -> Privileges:
    """Return the privileges for reading these tables."""
    return {role: {"SELECT": _OF_PAYMENTS if role == "payments" else _WHOLE} for role in roles}


READING: Privileges = reading(*COLUMNS)
"""The privileges for reading all tables."""

COUNTING: Privileges = {**STRUCTURE, **reading("outbox", "dead_letters", "workers")}
"""The privileges for `status`. This command reads three tables, but all tables must exist."""

EXPLAINING: Privileges = reading("payments", "outbox", "purchases", "processed_events", "dead_letters", "workers")
"""The privileges for `audit`, `why` and `backfill --dry-run`.

These commands read payments, events and purchases. The rows of ``workers`` list events that are set
aside: no worker claims these events. The payments of these events do not count as in flight.
"""

PRIVILEGES: Privileges = {
    "payments": READING["payments"],
    "outbox": {"SELECT": _WHOLE, "UPDATE": ("due_at", "attempts", "crashes", "last_error"), "DELETE": _WHOLE},
    "purchases": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": ("is_active", "deactivated_at")},
    "processed_events": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": _OF_MARKS},
    "dead_letters": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": (*_OF_BURIED, *_OF_RESOLVED)},
    "workers": {
        "SELECT": _WHOLE,
        "INSERT": _WHOLE,
        "UPDATE": _OF_WORKERS,
        "DELETE": _WHOLE,
    },
    "backfill_runs": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": _OF_RUNS, "DELETE": _WHOLE},
}
"""The privileges of a worker."""

DECIDING: Privileges = {
    "payments": READING["payments"],
    "outbox": {"SELECT": _WHOLE, "INSERT": _WHOLE},
    "purchases": READING["purchases"],
    "dead_letters": {"SELECT": _WHOLE, "UPDATE": (*_OF_RESOLVED, "actor", "note")},
}
"""The privileges of a person who requeues and discards dead letters."""

DISCARDING: Privileges = {role: needed for role, needed in DECIDING.items() if role != "outbox"}
"""The privileges of a person who only discards dead letters."""

PREVIEWING: Privileges = reading("payments", "purchases", "dead_letters")
"""The privileges for `dead-letters requeue --dry-run` and `discard --dry-run`."""

BACKFILLING: Privileges = {
    "payments": READING["payments"],
    "outbox": {"SELECT": _WHOLE},
    "purchases": {"SELECT": _WHOLE, "INSERT": _WHOLE},
    "processed_events": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": _OF_MARKS},
    "dead_letters": {"SELECT": _WHOLE, "UPDATE": _OF_RESOLVED},
    "workers": READING["workers"],
    "backfill_runs": {"SELECT": _WHOLE, "INSERT": _WHOLE, "UPDATE": _OF_RUNS},
}
"""The privileges of a person who runs `backfill`."""

OPERATING: Privileges = {**READING, **BACKFILLING, **{role: DECIDING[role] for role in ("outbox", "dead_letters")}}
"""The privileges of a person who decides on dead letters and runs `backfill`."""


class RoleKind(StrEnum):
    """The kinds of database roles that deploy/grants.sql creates, one kind for each task."""

    WORKER = "worker"
    OPERATOR = "operator"
    READER = "reader"


def kind_for(privileges: Privileges) -> RoleKind:
    """Return the kind of role that a command with these privileges needs."""
    if privileges == PRIVILEGES:
        return RoleKind.WORKER
    only_reads = all(privilege == "SELECT" for needed in privileges.values() for privilege in needed)
    return RoleKind.READER if only_reads else RoleKind.OPERATOR


# what: whether this role has each privilege on the table or on all named columns, in the given
# order. If no column is named, a privilege on one column is enough. DELETE exists only for whole
# tables · lock: none · index: the catalogue's indexes
_ALLOWED = text(
    """
    SELECT CASE
        WHEN has_table_privilege(relation, privilege) THEN true
        WHEN privilege = 'DELETE' THEN false
        WHEN cardinality(columns) = 0 THEN has_any_column_privilege(relation, privilege)
        ELSE (SELECT bool_and(has_column_privilege(attrelid, attnum, privilege)) FROM pg_attribute
              WHERE attrelid = relation AND attname = ANY(columns))
    END
    FROM (SELECT CAST(to_regclass(name) AS oid) AS relation, privilege, columns, position
          FROM ROWS FROM (jsonb_to_recordset(CAST(:asked AS jsonb)) AS (name text, privilege text, columns text[]))
               WITH ORDINALITY AS given (name, privilege, columns, position)) AS asked
    ORDER BY position
    """
)

# what: whether this role is allowed to read any column of a table, and to write to it · lock: none
_READS_AND_WRITES = text(
    """
    SELECT has_any_column_privilege(to_regclass(:name), 'SELECT') AS reads,
           has_any_column_privilege(to_regclass(:name), 'INSERT, UPDATE')
           OR has_table_privilege(to_regclass(:name), 'DELETE, TRUNCATE') AS writes
    """
)

# what: the schemas on which this role lacks USAGE · lock: none · index: the catalogue's indexes
CLOSED_SCHEMAS = text(
    "SELECT CAST(nspname AS text) FROM pg_namespace"
    " WHERE nspname = ANY(CAST(:schemas AS text[])) AND NOT has_schema_privilege(oid, 'USAGE')"
)


def in_grant(table: Table, privilege: str, keys: Sequence[str]) -> str:
    """Format a privilege for GRANT, with the columns of these keys.

    If there are no keys, the privilege covers the whole table.
    """
    return f"{privilege} ({', '.join(quoted(table.c[key].name) for key in keys)})" if keys else privilege


def may(session: Session, table: Table, privilege: str, keys: Sequence[str]) -> bool:
    """Return whether the role has the privilege.

    Ignore missing columns. Another check reports them.
    """
    return _allowed(session, [(table, privilege, keys)]) == [True]


def _allowed(session: Session, asked: Sequence[tuple[Table, str, Sequence[str]]]) -> list[bool]:
    """Return True for each asked privilege that the role has on the columns, otherwise False."""
    rows = [
        {"name": relation_name(table), "privilege": privilege, "columns": [table.c[key].name for key in keys]}
        for table, privilege, keys in asked
    ]
    return [found is not False for found in session.scalars(_ALLOWED, {"asked": json.dumps(rows)})]


def lacking(session: Session, present: Mapping[str, Table], privileges: Privileges) -> dict[str, list[str]]:
    """Return the needed privileges that the current role lacks, by table.

    ``present`` contains the existing tables.
    """
    needed = [(role, each, keys) for role in present for each, keys in privileges.get(role, {}).items()]
    allowed = _allowed(session, [(present[role], each, keys) for role, each, keys in needed])
    missing: dict[str, list[str]] = {}
    for (role, each, _), is_allowed in zip(needed, allowed, strict=True):
        if not is_allowed:
            missing.setdefault(role, []).append(each)
    return missing


def kind_of_role(session: Session, present: Mapping[str, Table]) -> RoleKind | None:
    """Find the kind of the current role by its privileges on the existing tables.

    A reader can read at least one table, but cannot write to any table. An operator has all
    privileges that operators need, but cannot change or delete events. Return None if the
    privileges fit no kind. For example, a new role has no privileges yet, or nobody ran
    deploy/grants.sql again after a migration.
    """
    if present and not lacking(session, present, PRIVILEGES):
        return RoleKind.WORKER
    outbox = present.get("outbox")
    if outbox is not None and not lacking(session, present, OPERATING):
        may_settle = any(may(session, outbox, each, _WHOLE) for each in ("UPDATE", "DELETE"))
        return None if may_settle else RoleKind.OPERATOR
    asked = [{"name": relation_name(table)} for table in present.values()]
    rows = [session.execute(_READS_AND_WRITES, each).one() for each in asked]
    is_reader = any(row.reads for row in rows) and not any(row.writes for row in rows)
    return RoleKind.READER if is_reader else None
