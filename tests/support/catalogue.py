"""Reads the definition of tables from the database, as plain values that tests can compare."""

from __future__ import annotations

from typing import Any

import psycopg

# what: the columns, constraints, indexes, triggers and comment of a table, as PostgreSQL writes
# them
_QUERIES = {
    "columns": """
        SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attnum,
               pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
        WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
    """,
    "constraints": """
        SELECT conname, pg_get_constraintdef(oid), convalidated
        FROM pg_constraint WHERE conrelid = to_regclass(%(table)s) AND contype <> 'n' ORDER BY 1
    """,
    "indexes": """
        SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid
        FROM pg_index WHERE indrelid = to_regclass(%(table)s) ORDER BY 1
    """,
    "triggers": """
        SELECT pg_get_triggerdef(oid) FROM pg_trigger
        WHERE tgrelid = to_regclass(%(table)s) AND NOT tgisinternal ORDER BY 1
    """,
    "table": """
        SELECT oid, relfilenode, relacl::text, reloptions, obj_description(oid, 'pg_class')
        FROM pg_class WHERE oid = to_regclass(%(table)s)
    """,
}


def describe(connection: psycopg.Connection[Any], table: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return the definition of a table from the catalogue. If necessary, ``table`` has a schema and
    quotes."""
    return {what: connection.execute(query, {"table": table}).fetchall() for what, query in _QUERIES.items()}


def tables(connection: psycopg.Connection[Any]) -> set[str]:
    """Return the names of all user tables, with their schemas."""
    query = """
        SELECT schemaname || '.' || tablename FROM pg_tables
        WHERE schemaname NOT IN ('pg_catalog', 'information_schema')
    """
    return {name for (name,) in connection.execute(query)}


def snapshot(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    """Return all tables with their rows, and all functions. A migration must not change them
    without a request."""
    described: dict[str, Any] = {}
    for table in sorted(tables(connection)):
        rows = connection.execute(f"SELECT to_jsonb(t)::text FROM {table} AS t ORDER BY 1").fetchall()
        described[table] = describe(connection, table) | {"rows": rows}
    functions = "SELECT proname FROM pg_proc WHERE pronamespace = to_regnamespace('public') ORDER BY 1"
    described["functions"] = connection.execute(functions).fetchall()
    return described
