"""Finds columns that can be NULL although the worker needs a value.

Builds the statements that forbid NULL. A column with NULL does not stop the worker. NULL affects
only one row. Without this check, nobody would notice the row with NULL.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Table, text
from sqlalchemy.orm import Session

from outbox_worker.schema.catalogue import actual_columns, as_owner, exists
from outbox_worker.schema.ids import INTEGERS
from outbox_worker.schema.privileges import CLOSED_SCHEMAS, may
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.requirements import NEVER_READ
from outbox_worker.schema.shapes import name_the_table, noun_of_view
from outbox_worker.schema.tables import Tables, quoted, relation_name

_VALUES: Mapping[tuple[str, str], str] = {
    ("outbox", "event_id"): "gen_random_uuid()",
    ("outbox", "created_at"): "now()",
    ("outbox", "due_at"): "now()",
    ("outbox", "attempts"): "0",
    ("outbox", "crashes"): "0",
    ("purchases", "is_active"): "false",
    ("processed_events", "processed_at"): "now()",
    ("dead_letters", "attempts"): "0",
}
"""Maps some columns to the value that the printed UPDATE statement writes instead of NULL.

The worker treats some of these values like NULL. The worker needs the other values to claim the
event (lock and settle it). For all other columns, a person must find the right value.
"""

_NEVER_CLAIMED = ("event_id", "event_type", "due_at")
"""The columns of the outbox that must have a value.

If one of these columns is NULL, no worker claims (locks and settles) the event.
"""


@dataclass(frozen=True, slots=True)
class _Nullable:
    """A table, and the keys of its columns that can be NULL although the worker needs a value."""

    role: str
    table: Table
    keys: Sequence[str]

    def names(self, keys: Collection[str]) -> str:
        return ", ".join(quoted(self.table.c[key].name) for key in self.keys if key in keys)


def nullable_keys(session: Session, role: str, table: Table) -> list[str]:
    """Return the keys of the columns that can be NULL although the worker needs a value."""
    actual = actual_columns(session, relation_name(table))
    needed = [each for each in table.columns if not each.nullable and (role, each.key) not in NEVER_READ]
    return [each.key for each in needed if each.name in actual and actual[each.name].may_be_null]


def nullable_columns(session: Session, tables: Tables) -> list[str]:
    """Return the names of all columns that can be NULL although the worker needs a value.

    This function reads no rows.
    """
    return [
        f"{relation_name(each.table)}.{quoted(each.table.c[key].name)}"
        for each in _nullable(session, tables)
        for key in each.keys
    ]


def find_nullable(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return the problems of tables whose columns can be NULL although the worker needs a value.

    The SQL in the remedy works with and without NULL in the rows. This function can read whole
    tables. If this role lacks the right to read a column, the function assumes that the column
    contains no NULL.
    """
    return [problem for each in _nullable(session, tables) for problem in _problems(session, each)]


def _nullable(session: Session, tables: Tables) -> Iterator[_Nullable]:
    by_role = tables.by_role()
    closed = set(session.scalars(CLOSED_SCHEMAS, {"schemas": [table.schema for table in by_role.values()]}))
    for role, table in by_role.items():
        if table.schema not in closed and exists(session, table) and (keys := nullable_keys(session, role, table)):
            yield _Nullable(role, table, keys)


def _problems(session: Session, found: _Nullable) -> Iterator[SchemaProblem]:
    name = relation_name(found.table)
    empty = [key for key in found.keys if _has_null(session, found.table, key)]
    noun = noun_of_view(session, found.table)
    fillable = [key for key in empty if (found.role, key) in _VALUES and not noun]
    undecided = [key for key in empty if key not in fillable]
    if undecided:
        nulls = " OR ".join(f"{quoted(found.table.c[key].name)} IS NULL" for key in undecided)
        yield SchemaProblem(
            f"{name} has rows in which a value is NULL: {found.names(undecided)}{_consequence(found, undecided)}",
            f"give these rows a value or delete them, then run doctor again: SELECT * FROM {name} WHERE {nulls};",  # noqa: S608
        )
    settled = [key for key in found.keys if key not in undecided]
    if settled and noun and found.role != "payments":
        yield SchemaProblem(
            f"columns of {name} may be NULL: {found.names(settled)}{_consequence(found, settled)}",
            name_the_table(found.role, noun),
        )
    elif settled and not noun:
        filled = f", and there are rows with NULL: {found.names(fillable)}" if fillable else ""
        yield SchemaProblem(
            f"columns of {name} may be NULL: {found.names(settled)}{filled}{_consequence(found, settled)}",
            as_owner(session, name) + " ".join([*_updates(session, found, fillable), _alter(found, settled)]),
        )


def _has_null(session: Session, table: Table, key: str) -> bool:
    """what: whether a row has NULL in a column · lock: none · index: one on the column, or none (reads the table)"""
    if not may(session, table, "SELECT", [key]):
        return False
    asked = f"SELECT EXISTS (SELECT FROM {relation_name(table)} WHERE {quoted(table.c[key].name)} IS NULL)"  # noqa: S608
    return bool(session.scalar(text(asked)))


def _consequence(found: _Nullable, keys: Collection[str]) -> str:
    lacking = found.names(set(_NEVER_CLAIMED).intersection(keys)) if found.role == "outbox" else ""
    return f"; the worker never claims an event without {lacking.replace(', ', ' or ')}" if lacking else ""


def _updates(session: Session, found: _Nullable, keys: Sequence[str]) -> list[str]:
    name = relation_name(found.table)
    columns = {key: quoted(found.table.c[key].name) for key in keys}
    return [
        f"UPDATE {name} SET {column} = {_value_for(session, found, key)} WHERE {column} IS NULL;"  # noqa: S608 - is printed
        for key, column in columns.items()
    ]


def _value_for(session: Session, found: _Nullable, key: str) -> str:
    """Return the value that replaces NULL.

    A missing integer event id gets a negative number. Producers use positive ids.
    """
    actual = actual_columns(session, relation_name(found.table))[found.table.c[key].name]
    if (found.role, key) == ("outbox", "event_id") and actual.base_type in INTEGERS:
        return f"-1 - {quoted(found.table.c.id.name)}"
    return _VALUES[found.role, key]


def _alter(found: _Nullable, keys: Sequence[str]) -> str:
    forbidden = ", ".join(f"ALTER COLUMN {quoted(found.table.c[key].name)} SET NOT NULL" for key in keys)
    return f"ALTER TABLE {relation_name(found.table)} {forbidden};"
