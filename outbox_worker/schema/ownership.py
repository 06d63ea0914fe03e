"""Checks that this role has the rights that the migrations need.

Other roles can own the schemas and tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Table, text

from outbox_worker.schema.catalogue import has_limited_amounts, is_owned, notifies, pair_indexes
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.tables import Tables, ownership_list, relation_name

# what: the owner of each schema (public belongs to the owner of the database), and whether this
# role is allowed to use the schema and to create objects in it. If the schema is missing: whether
# this role is allowed to create the schema · lock: none · index: the catalogue's indexes
_SCHEMAS = text(
    """
    SELECT quote_ident(wanted) AS name, n.oid IS NOT NULL AS is_there, quote_ident(d.datname) AS database,
           quote_ident(pg_get_userbyid(CASE
               WHEN n.oid IS NULL OR pg_get_userbyid(n.nspowner) = 'pg_database_owner' THEN d.datdba
               ELSE n.nspowner END)) AS owner,
           quote_ident(current_user) AS me,
           COALESCE(has_schema_privilege(n.oid, 'USAGE'), true) AS may_use,
           COALESCE(has_schema_privilege(n.oid, 'CREATE'), has_database_privilege(d.oid, 'CREATE')) AS may_create,
           wanted = ANY(CAST(:changed AS text[])) AS is_changed
    FROM unnest(CAST(:schemas AS text[])) AS wanted
    JOIN pg_database d ON d.datname = current_database()
    LEFT JOIN pg_namespace n ON n.nspname = wanted
    ORDER BY wanted
    """
)

# what: the owner and columns of a table, and the rights of this role on the table. Works even if
# this role is not allowed to use the schema · lock: none · index: the catalogue's indexes
_TABLE = text(
    """
    SELECT quote_ident(r.rolname) AS owner, r.rolsuper AS is_superusers, quote_ident(current_user) AS me,
           pg_has_role(r.oid, 'USAGE') AS may_alter,
           has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
               AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE') AS may_write,
           has_table_privilege(c.oid, 'TRIGGER') AS may_trigger,
           ARRAY(SELECT CAST(a.attname AS text) FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_roles r ON r.oid = c.relowner
    WHERE n.nspname = :schema AND c.relname = :name
    """
)


@dataclass(frozen=True, slots=True)
class _Present:
    """An existing table, and the rights of this role on the table.

    ``me`` is the name of this role. Both ``me`` and ``owner`` are quoted for SQL.
    """

    owner: str
    is_superusers: bool
    me: str
    may_alter: bool
    may_write: bool
    may_trigger: bool
    columns: Sequence[str]


def find_missing_rights(
    connection: Connection, tables: Tables, versions: Table, options: Collection[str]
) -> list[SchemaProblem]:
    """Return a problem for each right that the migrations need and this role lacks.

    Each problem names the owner and contains a remedy.
    """
    listed = ownership_list(tables.purchases)
    wanted = [*tables.by_role().values(), versions, listed]
    present = {table: row for table in wanted if (row := _present(connection, table)) is not None}
    schemas = {str(table.schema) for table in wanted}
    if closed := list(_closed_schemas(connection, schemas, {str(t.schema) for t in wanted if t not in present})):
        return closed
    ours = [table for table in present if table is not versions and is_owned(connection, table)]
    altered = [table for table in ours if {c.name for c in table.c} - {*present[table].columns}]
    if tables.purchases in ours and has_limited_amounts(connection, tables.purchases):
        altered.append(tables.purchases)
    builds_index = "unique_index" in options and not pair_indexes(connection, tables.purchases)
    builds_trigger = "notify" in options and not notifies(connection, tables.outbox)
    built_on = [tables.purchases] * builds_index + [tables.outbox] * builds_trigger
    return [
        *_closed_schemas(connection, schemas, {str(table.schema) for table in built_on}),
        *_not_alterable(present, [*altered, *([tables.purchases] if builds_index else [])]),
        *(_no_trigger(present, tables.outbox) if builds_trigger else ()),
        *(problem for table in (versions, listed) for problem in _not_writable(present, table)),
    ]


def _present(connection: Connection, table: Table) -> _Present | None:
    sought = {"schema": table.schema, "name": table.name}
    row = connection.execute(_TABLE, sought).one_or_none()
    return _Present(**row._mapping) if row else None


def _closed_schemas(
    connection: Connection, schemas: Collection[str], changed: Collection[str]
) -> Iterator[SchemaProblem]:
    """Report each schema that this role is not allowed to use.

    Also report each schema in ``changed`` if this role is not allowed to create anything in it.
    """
    for row in connection.execute(_SCHEMAS, {"schemas": [*schemas], "changed": [*changed]}):
        if row.may_use and (row.may_create or not row.is_changed):
            continue
        as_owner = f"run migrate as {row.owner}, or let {row.owner} run:"
        if row.is_there:
            yield SchemaProblem(
                f"the schema {row.name} belongs to {row.owner}, and {row.me} may not create anything in it",
                f"{as_owner} GRANT USAGE, CREATE ON SCHEMA {row.name} TO {row.me};",
            )
        else:
            yield SchemaProblem(
                f"there is no schema {row.name}, and {row.me} may not create one in the database {row.database}",
                f"{as_owner} GRANT CREATE ON DATABASE {row.database} TO {row.me};",
            )


def _not_alterable(present: Mapping[Table, _Present], tables: Sequence[Table]) -> Iterator[SchemaProblem]:
    """Report tables that this role is not allowed to alter.

    Only the owner of a table can alter the table or build an index on it.
    """
    for table in dict.fromkeys(table for table in tables if table in present):
        row, name = present[table], relation_name(table)
        if not row.may_alter:
            finding = f"the table {name} belongs to {row.owner}, and {row.me} may not alter it"
            yield SchemaProblem(finding, _as_owner(row))


def _no_trigger(present: Mapping[Table, _Present], outbox: Table) -> Iterator[SchemaProblem]:
    row, name = present.get(outbox), relation_name(outbox)
    if row is not None and not row.may_trigger:
        yield SchemaProblem(
            f"the table {name} belongs to {row.owner}, and {row.me} may not put a trigger on it",
            f"run migrate as {row.owner}, or let {row.owner} run: GRANT TRIGGER ON {name} TO {row.me};",
        )


def _not_writable(present: Mapping[Table, _Present], written: Table) -> Iterator[SchemaProblem]:
    row, name = present.get(written), relation_name(written)
    if row is not None and not row.may_write:
        finding = f"the table {name} belongs to {row.owner}, and {row.me} may not write to it"
        grant = f"run migrate as {row.owner}, or let {row.owner} run: GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO"
        yield SchemaProblem(finding, f"{grant} {row.me};" if row.is_superusers else _as_owner(row))


def _as_owner(row: _Present) -> str:
    """Return the remedy: run migrate as the owner, or become a member of the owner's role.

    If the owner is a superuser, the remedy contains no GRANT of the owner's role.
    """
    run = f"run migrate as {row.owner}"
    return run if row.is_superusers else f"{run}, or let a superuser run: GRANT {row.owner} TO {row.me};"
