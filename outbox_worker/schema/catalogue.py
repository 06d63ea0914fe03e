"""Reads PostgreSQL's catalogue: which tables, columns, indexes and triggers exist, and who created the tables."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import (
    Column,
    Connection,
    Table,
    text,
)
from sqlalchemy.orm import Session

from outbox_worker.schema.tables import NOTIFY_TRIGGER, OWNED, quoted, relation_name


def predicate_forms(purchases: Table) -> tuple[str, ...]:
    """Return the index predicates that mean "active", in the form that ``pg_get_expr`` prints.

    A partial index with any other predicate cannot be the guard.
    """
    column = quoted(purchases.c.is_active.name)
    return column, f"({column} = true)", f"({column} IS TRUE)"


# what: unique, valid, immediate, partial indexes on exactly the pair, that compare ids as the columns do
# lock: none · index: the catalogue's own
_PAIR_INDEXES = text(
    """
    SELECT c.relname, pg_get_expr(i.indpred, i.indrelid)
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE i.indrelid = to_regclass(:relation)
      AND i.indisunique AND i.indisvalid AND i.indisready AND i.indimmediate
      AND i.indpred IS NOT NULL AND i.indexprs IS NULL AND i.indnkeyatts = 2
      AND NOT EXISTS (SELECT FROM generate_series(0, 1) AS k (position)
                      JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.position]
                      JOIN pg_collation l ON l.oid IN (a.attcollation, i.indcollation[k.position])
                      WHERE a.attcollation <> i.indcollation[k.position] AND NOT l.collisdeterministic)
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
    base_type: str
    """The type below all domains. It is ``type_name`` if the type is no domain."""


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
            " a.attnotnull AND NOT a.atthasdef AND a.attidentity = '',"
            " (WITH RECURSIVE up AS (SELECT t.typname, t.typtype, t.typbasetype UNION ALL"
            "   SELECT b.typname, b.typtype, b.typbasetype FROM up JOIN pg_type b ON b.oid = up.typbasetype)"
            "  SELECT CAST(typname AS text) FROM up WHERE typtype <> 'd')"
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
