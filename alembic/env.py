"""Runs the migrations. The command `outbox-worker migrate` hands over a connection; plain `alembic` makes its own."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from outbox_worker.database import Database
from outbox_worker.migration import VERSION_TABLE
from outbox_worker.settings import Settings, load_settings


def run(connection: Connection, settings: Settings) -> None:
    connection.rollback()  # only on a connection at rest does alembic manage the transactions itself
    context.configure(
        connection=connection,
        version_table=VERSION_TABLE,
        version_table_schema=settings.schema_name,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    if context.is_offline_mode():
        raise SystemExit("The migrations look at the database before they change it: there is no offline mode.")
    given = context.config.attributes
    if "connection" in given:
        run(given["connection"], given["settings"])
        return
    settings = load_settings()
    given["settings"] = settings
    with Database(settings, deadline_seconds=None).engine.connect() as connection:
        run(connection, settings)


main()
