"""Finds what does not stop the worker, but can lose rows or purchases later.

Each concern has a finding and a remedy.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from outbox_worker.schema.catalogue import exists, unlogged_tables
from outbox_worker.schema.requirements import SchemaProblem, find_narrower
from outbox_worker.schema.tables import Tables, relation_name


def find_concerns(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return all concerns about the tables that exist."""
    return [*find_narrower(session, tables), *find_unlogged(session, tables)]


def find_unlogged(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a concern for each table and partition that PostgreSQL does not write to its write-ahead log.

    PostgreSQL empties such a table when the server starts after a crash, and does not copy it to standbys. Events,
    purchases and marks would then be lost, and ``audit`` could not tell.
    """
    names = [relation_name(table) for table in tables.by_role().values() if exists(session, table)]
    return [
        SchemaProblem(
            f"{name} is {'a temporary table' if is_temporary else 'UNLOGGED'}: a crash of the server empties it",
            f"name a permanent table in OUTBOX_TABLES instead of {name}"
            if is_temporary
            else f"as its owner: ALTER TABLE {name} SET LOGGED;",
        )
        for name, is_temporary in unlogged_tables(session, names)
    ]
