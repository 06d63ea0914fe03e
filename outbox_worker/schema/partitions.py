"""Builds the statements that create indexes.

Partitioned tables and plain tables need different statements. PostgreSQL refuses CREATE INDEX
CONCURRENTLY on a partitioned table. A unique index of a partitioned table must contain the
partition key.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Table, text
from sqlalchemy.orm import Session

from outbox_worker.schema.catalogue import is_partitioned
from outbox_worker.schema.tables import quoted, relation_name

_WITH_UNIQUE_INDEX = "outbox-worker migrate --with unique_index"

# what: whether these columns contain the partition keys of a table and of all its partitions · lock: none
# index: the catalogue's indexes
_CONTAIN_KEYS = text(
    """
    SELECT NOT EXISTS (
        SELECT FROM pg_partition_tree(to_regclass(:relation)) AS t
        JOIN pg_partitioned_table p ON p.partrelid = t.relid
        CROSS JOIN unnest(CAST(p.partattrs AS int2[])) AS k (attnum)
        WHERE NOT EXISTS (SELECT FROM pg_attribute a
                          WHERE a.attrelid = p.partrelid AND a.attnum = k.attnum AND k.attnum <> 0
                            AND a.attname = ANY(CAST(:columns AS text[]))))
    """
)


def can_be_unique(session: Session | Connection, table: Table, keys: Sequence[str]) -> bool:
    """Return whether a unique index on these columns is possible.

    A unique index of a partitioned table must contain the partition key.
    """
    asked = {"relation": relation_name(table), "columns": [table.c[key].name for key in keys]}
    return bool(session.scalar(_CONTAIN_KEYS, asked))


def create_index(session: Session | Connection, table: Table, keys: Sequence[str], *, unique: bool = False) -> str:
    """Return the statement that creates an index. Omit CONCURRENTLY if the table is partitioned."""
    kind = "UNIQUE INDEX" if unique else "INDEX"
    how = "" if is_partitioned(session, table) else " CONCURRENTLY"
    columns = ", ".join(quoted(table.c[key].name) for key in keys)
    return f"CREATE {kind}{how} ON {relation_name(table)} ({columns});"


def why_no_pair_index(purchases: Table) -> str:
    """Return why a partitioned ``purchases`` table never has a unique index on student and course.

    ``payment_id`` must also be unique. The partition key can therefore contain no other column.
    """
    return (
        f"{relation_name(purchases)} is partitioned, and a partitioned table can have a unique index on student and "
        "course only if the index contains the partition key; the worker stays with the guard lock"
    )


def build_pair_index(session: Session, purchases: Table) -> str:
    """Return the remedy if no unique index can be the guard."""
    if is_partitioned(session, purchases):
        return f"{why_no_pair_index(purchases)}; let other programs take the lock, too"
    return _WITH_UNIQUE_INDEX
