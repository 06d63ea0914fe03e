"""Reads PostgreSQL's catalogue: which tables, columns, indexes and triggers exist, and who created the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    Column,
    Connection,
    Table,
    text,
)
from sqlalchemy.orm import Session

from outbox_worker.schema.tables import NOTIFY_TRIGGER, OWNED, quoted, relation_name

_COMMAND_BITS = {"INSERT": 4, "DELETE": 8, "UPDATE": 16}
"""The bit of each command in ``pg_trigger.tgtype``."""
_COMMAND_NUMBERS = {"UPDATE": "2", "INSERT": "3", "DELETE": "4"}
"""The number of each command in ``pg_rewrite.ev_type``."""


def predicate_forms(purchases: Table) -> tuple[str, ...]:
    """Return the index predicates that mean "active", in the form that ``pg_get_expr`` prints.

    A partial index with any other predicate cannot be the guard.
    """
    column = quoted(purchases.c.is_active.name)
    return column, f"({column} = true)", f"({column} IS TRUE)"


# what: unique, valid, immediate, partial indexes on exactly the pair · lock: none · index: the catalogue's own
_PAIR_INDEXES = text(
    """
    SELECT c.relname, pg_get_expr(i.indpred, i.indrelid)
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE i.indrelid = to_regclass(:relation)
      AND i.indisunique AND i.indisvalid AND i.indisready AND i.indimmediate
      AND i.indpred IS NOT NULL AND i.indexprs IS NULL AND i.indnkeyatts = 2
      AND (SELECT array_agg(CAST(a.attname AS text) ORDER BY CAST(a.attname AS text)) FROM pg_attribute a
           WHERE a.attrelid = i.indrelid AND a.attnum IN (i.indkey[0], i.indkey[1]))
        = (SELECT array_agg(n ORDER BY n) FROM unnest(CAST(:columns AS text[])) AS n)
    """
)

# what: the first two columns of every valid index of a table · lock: none · index: the catalogue's own
_LEADING_COLUMNS = text(
    """
    SELECT ARRAY(SELECT CAST(a.attname AS text) FROM generate_series(0, 1) AS k(position)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.position]
                 ORDER BY k.position) AS names
    FROM pg_index i WHERE i.indrelid = to_regclass(:relation) AND i.indisvalid AND i.indkey[0] <> 0
    """
)

# what: whether a table has an enabled trigger of this name · lock: none · index: the catalogue's own
_HAS_TRIGGER = text(
    "SELECT EXISTS (SELECT FROM pg_trigger"
    " WHERE tgrelid = to_regclass(:relation) AND tgname = :name AND tgenabled IN ('O', 'A'))"
)


def pair_indexes(session: Session | Connection, purchases: Table) -> dict[str, str]:
    """Return the names of the indexes that can be the guard, each with its predicate from ``pg_get_expr``."""
    columns = [purchases.c.student_id.name, purchases.c.course_id.name]
    found = session.execute(_PAIR_INDEXES, {"relation": relation_name(purchases), "columns": columns})
    return {name: predicate for name, predicate in found if predicate in predicate_forms(purchases)}


def has_index_paths(session: Session, purchases: Table) -> bool:
    """Return whether one index begins with the payment, and another one with the two columns of the pair."""
    found = session.scalars(_LEADING_COLUMNS, {"relation": relation_name(purchases)}).all()
    payment, *pair = (purchases.c[key].name for key in ("payment_id", "student_id", "course_id"))
    return any(names[0] == payment for names in found) and any(set(names[:2]) == set(pair) for names in found)


@dataclass(frozen=True, slots=True)
class ActualColumn:
    """The properties of a column in the catalogue."""

    type_name: str
    is_enum: bool
    must_be_written: bool
    """Whether the column is NOT NULL without a default."""


def exists(session: Session | Connection, table: Table) -> bool:
    asked = text("SELECT to_regclass(:name) IS NOT NULL")
    return bool(session.scalar(asked, {"name": relation_name(table)}))


def is_owned(session: Session | Connection, table: Table) -> bool:
    """Return whether the worker's migrations created the table. All other tables are adopted."""
    asked = text("SELECT obj_description(to_regclass(:name), 'pg_class') = :owned")
    return bool(session.scalar(asked, {"name": relation_name(table), "owned": OWNED}))


def role_name(session: Session) -> str:
    """Return the name of the current role, quoted if needed."""
    role: str = session.scalars(text("SELECT quote_ident(current_user)")).one()
    return role


def actual_columns(session: Session, name: str) -> dict[str, ActualColumn]:
    rows = session.execute(
        text(
            "SELECT a.attname, t.typname, t.typtype = 'e',"
            " a.attnotnull AND NOT a.atthasdef AND a.attidentity = ''"
            " FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid"
            " WHERE a.attrelid = to_regclass(:name) AND a.attnum > 0 AND NOT a.attisdropped"
        ),
        {"name": name},
    )
    return {row[0]: ActualColumn(*row[1:]) for row in rows}


def is_unique(session: Session, name: str, column: Column[object]) -> bool:
    asked = text(
        "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a"
        " ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]"
        " WHERE i.indrelid = to_regclass(:name) AND i.indisunique AND i.indisvalid AND i.indimmediate"
        " AND (i.indpred IS NULL OR pg_get_expr(i.indpred, i.indrelid) = :partial)"
        " AND i.indexprs IS NULL AND i.indnkeyatts = 1 AND a.attname = :column)"
    )
    partial = f"({quoted(column.name)} IS NOT NULL)" if column.nullable else None
    return bool(session.scalar(asked, {"name": name, "column": column.name, "partial": partial}))


def notifies(session: Session | Connection, outbox: Table) -> bool:
    """Return whether the option ``notify`` is in force, that is, whether the outbox has the enabled trigger."""
    asked = {"relation": relation_name(outbox), "name": NOTIFY_TRIGGER}
    return bool(session.scalar(_HAS_TRIGGER, asked))


@dataclass(frozen=True, slots=True)
class Interference:
    """A trigger or a rule of somebody else that may refuse or swallow a command."""

    name: str
    is_rule: bool
    swallows: bool
    """Whether it may make the command change no row without an error: a rule with INSTEAD, or a BEFORE trigger whose
    function returns NULL."""
    lets_none_through: bool
    """Whether it swallows the command for every row, as far as its definition shows."""

    def __str__(self) -> str:
        return f"the {'rule' if self.is_rule else 'trigger'} {quoted(self.name)}"


# what: enabled row triggers of a command, BEFORE and AFTER, and rules with INSTEAD · lock: none
# index: the catalogue's own · a function that returns NULL and never OLD or NEW lets no row through
_INTERFERENCE = text(
    r"""
    SELECT CAST(t.tgname AS text) AS name, false AS is_rule,
           t.tgtype & 2 = 2 AND p.prosrc ~* '\mreturn\s+null\M' AS swallows,
           t.tgtype & 2 = 2 AND p.prosrc ~* '\mreturn\s+null\M' AND p.prosrc !~* '\mreturn\s+(old|new)\M'
           AND t.tgqual IS NULL AS lets_none_through
    FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE t.tgrelid = to_regclass(:relation) AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A')
      AND t.tgtype & 1 = 1 AND t.tgtype & CAST(:bit AS int) <> 0
    UNION ALL
    SELECT CAST(rulename AS text), true, true, ev_qual = '<>'
    FROM pg_rewrite
    WHERE ev_class = to_regclass(:relation) AND is_instead AND ev_enabled IN ('O', 'A') AND ev_type = :number
    ORDER BY 3 DESC, 1
    """
)

# what: the root of a table's partitions, and the columns of a unique index of the table · lock: none
# index: the catalogue's own
_UNIQUE_KEY = text(
    """
    SELECT coalesce(pg_partition_root(t.oid), t.oid) = to_regclass(:relation) AS is_of_table,
           CASE WHEN i.indexprs IS NULL THEN
               ARRAY(SELECT CAST(a.attname AS text) FROM generate_series(0, i.indnkeyatts - 1) AS k (position)
                     JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.position])
           END AS names
    FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace
    JOIN pg_index i ON i.indrelid = t.oid JOIN pg_class c ON c.oid = i.indexrelid
    WHERE n.nspname = :schema AND t.relname = :table AND c.relname = :name
    """
)

# what: the sequence that fills a column by default or as an identity · lock: none · index: the catalogue's own
_SEQUENCES = text(
    """
    SELECT CAST(a.attname AS text) AS column_name, quote_ident(n.nspname) || '.' || quote_ident(s.relname) AS sequence
    FROM pg_attribute a
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    JOIN pg_depend dep
      ON dep.classid = CAST('pg_attrdef' AS regclass) AND dep.objid = d.oid
         AND dep.refclassid = CAST('pg_class' AS regclass) AND dep.deptype = 'n'
      OR dep.classid = CAST('pg_class' AS regclass) AND dep.refclassid = CAST('pg_class' AS regclass)
         AND dep.refobjid = a.attrelid AND dep.refobjsubid = a.attnum AND dep.deptype = 'i'
    JOIN pg_class s ON s.relkind = 'S' AND s.oid = CASE dep.deptype WHEN 'i' THEN dep.objid ELSE dep.refobjid END
    JOIN pg_namespace n ON n.oid = s.relnamespace
    WHERE a.attrelid = to_regclass(:relation) AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum
    """
)


def interference(session: Session, table: Table, command: str) -> Sequence[Interference]:
    """Return the triggers and rules that may refuse or swallow a command on a table. Those that swallow come first."""
    asked = {"bit": _COMMAND_BITS[command], "number": _COMMAND_NUMBERS[command]}
    return [Interference(*row) for row in session.execute(_INTERFERENCE, {"relation": relation_name(table), **asked})]


def likely_cause(session: Session, table: Table, command: str, *, swallowed: bool) -> str:
    """Name what may have refused a command on a table, or swallowed it. Return an empty string if nothing may have."""
    found = interference(session, table, command)
    named = [str(each) for each in found if each.swallows or not swallowed]
    if swallowed and not named:
        named = [str(each) for each in found]
    if session.scalar(text("SELECT row_security_active(:name)"), {"name": relation_name(table)}):
        named.append("row security")
    return " or ".join(named)


def unique_key(session: Session, table: Table, error_of: tuple[str | None, str | None, str | None]) -> set[str] | None:
    """Return the columns of a unique index, given its schema, table and name.

    Return None if the index is not one of this table or its partitions, or if it has expressions.
    """
    schema, name, index = error_of
    asked = {"relation": relation_name(table), "schema": schema, "table": name, "name": index}
    row = session.execute(_UNIQUE_KEY, asked).one_or_none()
    return set(row.names) if row is not None and row.is_of_table and row.names else None


def sequences(session: Session, table: Table) -> dict[str, str]:
    """Return the sequence of each column that a sequence fills by default."""
    return {row.column_name: row.sequence for row in session.execute(_SEQUENCES, {"relation": relation_name(table)})}


def set_sequence(table: Table, column: str, sequence: str) -> str:
    """Return the statement that sets a sequence to the largest value of its column."""
    name = sequence.replace("'", "''")
    return f"SELECT setval('{name}', (SELECT CAST(max({quoted(column)}) AS bigint) FROM {relation_name(table)}));"  # noqa: S608 - printed, names are quoted
