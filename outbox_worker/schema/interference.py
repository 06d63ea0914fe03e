"""Finds possible causes of a failed or swallowed write, for example triggers and rules.

A swallowed write changes no row, but raises no error. Other causes are row security, unique keys
and sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import Table, text
from sqlalchemy.orm import Session

from outbox_worker.schema.tables import quoted, relation_name

_COMMAND_BITS = {"INSERT": 4, "DELETE": 8, "UPDATE": 16}
"""Maps each command to its bit in ``pg_trigger.tgtype``."""
_COMMAND_NUMBERS = {"UPDATE": "2", "INSERT": "3", "DELETE": "4"}
"""Maps each command to its number in ``pg_rewrite.ev_type``."""


@dataclass(frozen=True, slots=True)
class Interference:
    """A trigger or rule of another application that can make a command fail, or swallow it.

    A swallowed command changes no row, but raises no error.
    """

    name: str
    is_rule: bool
    swallows: bool
    """True for a rule with INSTEAD, and for a BEFORE trigger whose function can return NULL.

    The command can then change no row and raise no error.
    """
    lets_none_through: bool
    """True if the definition shows that the trigger or rule swallows every row."""

    def __str__(self) -> str:
        return f"the {'rule' if self.is_rule else 'trigger'} {quoted(self.name)}"


# what: the enabled row triggers (BEFORE and AFTER) and the INSTEAD rules of a command. A trigger function that returns
# NULL, and never OLD or NEW, lets no row through · lock: none · index: the catalogue's indexes
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

# what: whether a unique index is on this table or one of its partitions, and the columns of the index · lock: none
# index: the catalogue's indexes
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

# what: the columns that a sequence fills by default or as an identity, each with its sequence · lock: none
# index: the catalogue's indexes
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
    """Return the triggers and rules that can make a command on a table fail, or swallow it.

    A swallowed command changes no row, but raises no error. The triggers and rules that can swallow
    the command are first in the result.
    """
    asked = {"bit": _COMMAND_BITS[command], "number": _COMMAND_NUMBERS[command]}
    return [Interference(*row) for row in session.execute(_INTERFERENCE, {"relation": relation_name(table), **asked})]


def likely_cause(session: Session, table: Table, command: str, *, swallowed: bool) -> str:
    """Name the triggers, rules and row security that possibly made a command on a table fail.

    If ``swallowed`` is true, the command raised no error, but changed too few rows. Return an empty
    string if this function finds no possible cause.
    """
    found = interference(session, table, command)
    named = [str(each) for each in found if each.swallows or not swallowed]
    if swallowed and not named:
        named = [str(each) for each in found]
    if session.scalar(text("SELECT row_security_active(:name)"), {"name": relation_name(table)}):
        named.append("row security")
    return " or ".join(named)


def unique_key(session: Session, table: Table, error_of: tuple[str | None, str | None, str | None]) -> set[str] | None:
    """Return the columns of a unique index.

    ``error_of`` contains the schema, the table and the name of the index. Return None if the
    index is on another table or has expressions. An index on a partition of ``table`` counts as an
    index on ``table``.
    """
    schema, name, index = error_of
    asked = {"relation": relation_name(table), "schema": schema, "table": name, "name": index}
    row = session.execute(_UNIQUE_KEY, asked).one_or_none()
    return set(row.names) if row is not None and row.is_of_table and row.names else None


def sequences(session: Session, table: Table) -> dict[str, str]:
    """Map each column whose default values come from a sequence to the name of the sequence."""
    return {row.column_name: row.sequence for row in session.execute(_SEQUENCES, {"relation": relation_name(table)})}


# what: the last value that a sequence gave. NULL if it gave no value, or if this role is not
# allowed to see the value · lock: none · index: the catalogue's indexes
_LAST_VALUE = text(
    "SELECT last_value FROM pg_sequences"
    " WHERE to_regclass(format('%I.%I', schemaname, sequencename)) = to_regclass(:sequence)"
)


def last_and_largest(session: Session, table: Table, column: str, sequence: str) -> tuple[int | None, int | None]:
    """Return the last value of a sequence and the largest value of its column.

    Return None for a value that is not known.
    """
    largest = session.scalar(text(f"SELECT max({quoted(column)}) FROM {relation_name(table)}"))  # noqa: S608 - the names are quoted
    last: int | None = session.scalar(_LAST_VALUE, {"sequence": sequence})
    return last, int(largest) if isinstance(largest, int | Decimal) else None


def set_sequence(table: Table, column: str, sequence: str) -> str:
    """Return the statement that sets a sequence to the largest value of its column."""
    name = sequence.replace("'", "''")
    return f"SELECT setval('{name}', (SELECT CAST(max({quoted(column)}) AS bigint) FROM {relation_name(table)}));"  # noqa: S608 - printed, names are quoted
