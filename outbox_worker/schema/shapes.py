"""Finds tables for which PostgreSQL refuses the worker's writes or deletes the worker's rows.

The causes are views, generated columns, rules and foreign keys to the outbox. Only other
applications create these objects. The migrations create no such objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlalchemy import Row, Table, text
from sqlalchemy.orm import Session

from outbox_worker.model import COLUMNS
from outbox_worker.schema.catalogue import ActualColumn, actual_columns, as_owner, kind_of_relation
from outbox_worker.schema.privileges import PRIVILEGES
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.tables import quoted, relation_name

_VIEWS: Mapping[str, str] = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
"""Maps the values of ``pg_class.relkind`` to names, for relations that are not tables."""

_UPSERTED = ("purchases", "processed_events", "dead_letters")
"""The tables with results of events. The worker writes these tables with INSERT … ON CONFLICT.

The worker also writes ``workers`` in this way.
"""

_NOT_WRITTEN = (
    *(("purchases", "id"), ("dead_letters", "actor"), ("dead_letters", "note")),
    *(("workers", "started_at"), ("backfill_runs", "started_at")),
)
"""Columns that the worker does not write.

They keep their defaults, or only a person's decision writes them.
"""

_WRITTEN: Mapping[str, tuple[str, ...]] = {
    "outbox": PRIVILEGES["outbox"]["UPDATE"],
    **{
        role: tuple(key for key in COLUMNS[role] if (role, key) not in _NOT_WRITTEN)
        for role in (*_UPSERTED, "workers", "backfill_runs")
    },
}
"""The columns that the worker writes, by table."""

# what: the rules that make PostgreSQL refuse INSERT … ON CONFLICT (even a disabled rule ON UPDATE),
# and the rules that make every INSERT write nothing. The command type of a rule with NOTHING is 7
# (before PostgreSQL 15: 6)
# lock: none · index: the catalogue's indexes
_RULES = text(
    """
    WITH rules AS (
        SELECT CAST(rulename AS text) AS name, CASE ev_type WHEN '2' THEN 'UPDATE' ELSE 'INSERT' END AS command,
               ev_enabled IN ('O', 'A') AS is_enabled, is_instead AND ev_qual = '<>' AS is_instead_of_all,
               substring(ev_action FROM 'commandType ([0-9]+)') = CASE
                   WHEN CAST(current_setting('server_version_num') AS int) < 150000 THEN '6' ELSE '7'
               END AS does_nothing
        FROM pg_rewrite WHERE ev_class = to_regclass(:relation) AND ev_type IN ('2', '3'))
    SELECT name, command, command = 'INSERT' AND does_nothing AS writes_nothing FROM rules
    WHERE command = 'UPDATE' OR is_enabled AND (is_instead_of_all OR NOT does_nothing)
    ORDER BY name
    """
)

# what: the foreign keys from a table or its partitions to the outbox, without foreign keys that are
# NOT ENFORCED: PostgreSQL 18 does not check these · lock: none · index: the catalogue's indexes
_KEYS_TO_OUTBOX = text(
    """
    SELECT CAST(c.conname AS text) AS name, format('%I.%I', n.nspname, t.relname) AS relation,
           CAST(c.confdeltype AS text) AS on_delete
    FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE c.contype = 'f' AND c.conparentid = 0 AND to_jsonb(c) ->> 'conenforced' IS DISTINCT FROM 'false'
      AND coalesce(pg_partition_root(c.conrelid), c.conrelid) = to_regclass(:relation)
      AND coalesce(pg_partition_root(c.confrelid), c.confrelid) = to_regclass(:outbox)
    ORDER BY relation, c.conname
    """
)

_CASCADE = "c"
_SETS_A_VALUE = ("n", "d")


def noun_of_view(session: Session, table: Table) -> str | None:
    """Return "a view", "a materialized view" or "a foreign table". Return None for a table."""
    return _VIEWS.get(kind_of_relation(session, table) or "")


def name_the_table(role: str, noun: str) -> str:
    """Return the remedy for a view.

    ALTER TABLE cannot add a column, a unique key or NOT NULL to a view.
    """
    return f"it is {noun}: name the table behind it in OUTBOX_TABLES ({role}=…)"


def find_unwritable_view(session: Session, role: str, table: Table) -> SchemaProblem | None:
    """Return a problem if the worker cannot write a relation that is no table.

    The worker only reads ``payments``. ``payments`` can therefore be a view.
    """
    noun = noun_of_view(session, table)
    if noun is None or role == "payments" or (role not in _UPSERTED and noun != _VIEWS["m"]):
        return None
    why = "PostgreSQL never lets a program write one" if noun == _VIEWS["m"] else "it can have no unique key"
    return SchemaProblem(f"{relation_name(table)} is {noun}, not a table: {why}", name_the_table(role, noun))


def find_generated(session: Session, role: str, table: Table) -> Iterator[SchemaProblem]:
    """Report columns that PostgreSQL computes although the worker writes them.

    PostgreSQL refuses every write of the worker to these columns.
    """
    written = {table.c[key].name for key in _WRITTEN.get(role, ())}
    relation = relation_name(table)
    for name, column in actual_columns(session, relation).items():
        if name in written and column.computed:
            kind = "GENERATED ALWAYS AS IDENTITY" if column.computed == "identity" else "a generated column"
            yield SchemaProblem(
                f"column {relation}.{name} is {kind}, so PostgreSQL refuses every value that the worker writes",
                as_owner(session, relation) + _let_be_written(relation, name, column),
            )


def _let_be_written(relation: str, name: str, actual: ActualColumn) -> str:
    """Return the statements that make a generated column a plain column with the same values."""
    column = quoted(name)
    if actual.computed == "identity":
        return f"ALTER TABLE {relation} ALTER COLUMN {column} SET GENERATED BY DEFAULT;"
    if actual.computed == "stored":
        return f"ALTER TABLE {relation} ALTER COLUMN {column} DROP EXPRESSION;"
    new = quoted(f"{name[:50]}_written")
    return (
        f"ALTER TABLE {relation} ADD COLUMN {new} {actual.written_type}; UPDATE {relation} SET {new} = {column}; "  # noqa: S608 - is printed
        f"ALTER TABLE {relation} DROP COLUMN {column}; ALTER TABLE {relation} RENAME COLUMN {new} TO {column};"
    )


def rules_against_upserts(session: Session, role: str, table: Table) -> list[str]:
    """Return the names of the rules that ``find_rules`` reports."""
    return [row.name for row in _rules(session, role, table)]


def find_rules(session: Session, role: str, table: Table) -> Iterator[SchemaProblem]:
    """Report the rules that prevent every INSERT … ON CONFLICT of the worker."""
    relation = relation_name(table)
    for row in _rules(session, role, table):
        why = (
            "the worker's INSERT writes no row"
            if row.writes_nothing
            else "PostgreSQL refuses INSERT … ON CONFLICT on a table with such a rule, even if the rule is disabled"
            if row.command == "UPDATE"
            else "PostgreSQL refuses INSERT … ON CONFLICT on a table with such a rule"
        )
        yield SchemaProblem(
            f"{relation} has the rule {quoted(row.name)} ON {row.command}: {why}",
            f"{as_owner(session, relation)}DROP RULE {quoted(row.name)} ON {relation};",
        )


def _rules(session: Session, role: str, table: Table) -> list[Row[str, str, bool]]:
    return [*session.execute(_RULES, {"relation": relation_name(table)})] if role in (*_UPSERTED, "workers") else []


def find_keys_to_outbox(session: Session, role: str, table: Table, outbox: Table) -> Iterator[SchemaProblem]:
    """Report foreign keys to the outbox.

    The worker deletes each event after it has written a mark or a dead letter. A foreign key from
    ``purchases`` is a problem only if it deletes purchases. The worker never writes the column of
    this foreign key.
    """
    if role not in _UPSERTED:
        return
    asked = {"relation": relation_name(table), "outbox": relation_name(outbox)}
    for row in session.execute(_KEYS_TO_OUTBOX, asked):
        if role != "purchases" or row.on_delete == _CASCADE:
            name = quoted(row.name)
            yield SchemaProblem(
                f"{row.relation} has the foreign key {name} to {relation_name(outbox)}: {_why_no_key(row.on_delete)}",
                f"{as_owner(session, row.relation)}ALTER TABLE {row.relation} DROP CONSTRAINT {name};",
            )


def _why_no_key(on_delete: str) -> str:
    if on_delete == _CASCADE:
        return (
            "if the worker removes an event from the outbox, PostgreSQL also deletes the row that refers to the event"
        )
    if on_delete in _SETS_A_VALUE:
        return "if the worker removes an event from the outbox, PostgreSQL overwrites the event's id in this row"
    return "PostgreSQL refuses to remove an event from the outbox while this row refers to the event"
