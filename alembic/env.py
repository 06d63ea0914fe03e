"""Runs the migrations. The command `outbox-worker migrate` hands over a connection; plain `alembic` makes its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context
from sqlalchemy import Connection

from outbox_worker.database.engine import Database
from outbox_worker.schema.migrate import VERSION_TABLE
from outbox_worker.settings import Settings, load_settings


def run(connection: Connection, settings: Settings) -> None:
    _create_schema(connection, settings.schema_name)
    connection.rollback()  # only on a connection at rest does alembic manage the transactions itself
    context.configure(
        connection=connection,
        version_table=VERSION_TABLE,
        version_table_schema=settings.schema_name,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _create_schema(connection: Connection, name: str) -> None:
    """The version table needs it before the first revision runs."""
    if name not in sa.inspect(connection).get_schema_names():
        connection.execute(sa.schema.CreateSchema(name))
        connection.commit()


def main() -> None:
    if context.is_offline_mode():
        raise SystemExit("The migrations look at the database before they change it: there is no offline mode.")
    given = context.config.attributes
    if "connection" in given:
        run(given["connection"], given["settings"])
        return
    settings = load_settings()
    given["settings"] = settings
    database = Database(settings, deadline_seconds=None)
    try:
        with database.engine.connect() as connection:
            run(connection, settings)
    finally:
        database.close()


main()
