"""Runs the migrations. `outbox-worker migrate` passes a connection to this file.

For plain `alembic`, this file opens a connection. `alembic check` compares the tables that our
migrations created with the tables that the program expects. The optional branches do not change the
result. The check skips tables of other applications, also tables that the worker uses (adopted
tables).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.runtime.migration import MigrationContext
from alembic.util import load_python_file
from sqlalchemy import Connection
from sqlalchemy.schema import SchemaItem

from outbox_worker.database.engine import Database
from outbox_worker.errors import Refused
from outbox_worker.schema.catalogue import is_owned
from outbox_worker.schema.migrate import VERSION_TABLE
from outbox_worker.schema.tables import OWNED, PAIR_INDEX, PAIR_LOOKUP_INDEX, Tables, build_tables
from outbox_worker.settings import Settings, load_settings

naming = load_python_file(str(Path(__file__).parent), "naming.py")


def run(connection: Connection, settings: Settings) -> None:
    tables = build_tables(settings)
    _create_schema(connection, settings.schema_name)
    context.config.attributes["naming"] = naming.Naming(settings.schema_name, {**settings.tables}, {**settings.columns})
    configure = partial(
        context.configure,
        connection=connection,
        version_table=VERSION_TABLE,
        version_table_schema=settings.schema_name,
        transaction_per_migration=True,
        target_metadata=tables.metadata,
    )
    connection.rollback()  # alembic manages transactions only if no transaction is open yet
    configure()
    if "revision_context" in (given := context.get_context().opts):
        comparison = Comparison(connection, tables)
        connection.rollback()
        configure(fn=partial(_compare, given["fn"]), **comparison.options())
    try:
        with context.begin_transaction():
            context.run_migrations()
    except naming.RevisionRefused as refusal:
        raise Refused(str(refusal)) from refusal


class Comparison:
    """Makes alembic compare only our own tables, without the indexes of the optional branches."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        inspector = sa.inspect(connection)
        self._default_schema = inspector.default_schema_name
        self._purchases, self._payments = tables.purchases, tables.payments
        self._ours = {_name(table) for table in tables.metadata.tables.values()}
        self._adopted = {
            _name(table)
            for table in tables.metadata.tables.values()
            if inspector.has_table(table.name, schema=table.schema) and not is_owned(connection, table)
        }
        for table in tables.metadata.tables.values():
            table.comment = OWNED
        self._accept_default(inspector, tables.purchases.c.id)

    @staticmethod
    def _accept_default(inspector: sa.Inspector, expected: sa.Column[Any]) -> None:
        """Accept any default of this column.

        ``core_0007`` chooses the default by the version of the server.
        """
        table = expected.table
        found = inspector.get_columns(table.name, table.schema) if inspector.has_table(table.name, table.schema) else []
        for column in found:
            if column["name"] == expected.name and column["default"] is not None:
                expected.server_default = sa.DefaultClause(sa.text(column["default"]))

    def options(self) -> dict[str, Any]:
        return {
            "include_schemas": True,
            "include_name": self._is_read,
            "include_object": self._is_compared,
            "compare_type": self._is_of_other_type,
            "compare_server_default": True,
        }

    def _is_read(self, name: str | None, kind: str, parents: Mapping[str, str | None]) -> bool:
        """Return whether the worker uses this schema or table.

        Alembic passes None as the name of the default schema.
        """
        if kind == "schema":
            return (name or self._default_schema) in {schema for schema, _ in self._ours}
        return kind != "table" or (parents["schema_name"] or self._default_schema, name) in self._ours

    def _is_compared(self, item: SchemaItem, name: str | None, _kind: str, _reflected: bool, _other: object) -> bool:
        """Exclude tables of other applications, and the indexes of the branch ``unique_index``."""
        if isinstance(item, sa.Table):
            return _name(item) not in self._adopted
        return not isinstance(item, sa.Index) or name not in (PAIR_INDEX, PAIR_LOOKUP_INDEX)

    def _is_of_other_type(self, _0: object, _1: object, expected: sa.Column[Any], *types: object) -> bool | None:
        """Return whether alembic must report a difference in type. Return None to let alembic decide.

        If another application owns the payments table, accept any type of the ids and the currency
        in purchases. The migrations copy these types from the payments table.
        """
        is_unlimited = isinstance(expected.type, sa.Numeric) and expected.type.precision is None
        if is_unlimited and getattr(types[0], "precision", None):
            return True  # alembic itself sees no difference between ``numeric`` with and without limits
        follows = expected.table is self._purchases and expected.key in ("student_id", "course_id", "currency")
        return False if follows and _name(self._payments) in self._adopted else None


def _name(table: sa.Table) -> tuple[str | None, str]:
    return table.schema, table.name


def _compare(
    compare: Callable[[tuple[str, ...], MigrationContext], Iterable[Any]],
    revisions: tuple[str, ...],
    migration: MigrationContext,
) -> Iterable[Any]:
    """Compare even if the database has no revision of an optional branch. Alembic itself refuses this comparison."""
    begun = {"core", *_labels(revisions)}
    not_begun = [head for head in context.script.get_heads() if not begun & _labels([head])]
    return compare((*revisions, *not_begun), migration)


def _labels(revisions: Iterable[str]) -> set[str]:
    return {label for revision in revisions for label in context.script.get_revision(revision).branch_labels}


def _create_schema(connection: Connection, name: str) -> None:
    """Create the schema of the version table if it is missing.

    Alembic needs the schema before the first revision.
    """
    if name not in sa.inspect(connection).get_schema_names():
        connection.execute(sa.schema.CreateSchema(name))
        connection.commit()


def main() -> None:
    if context.is_offline_mode():
        raise SystemExit("There is no offline mode, because the migrations read the database before they change it.")
    given = context.config.attributes
    if "connection" in given:
        run(given["connection"], given["settings"])
        return
    settings = load_settings()
    database = Database(settings, deadline_seconds=None)
    try:
        with database.engine.connect() as connection:
            run(connection, settings)
    finally:
        database.close()


main()
