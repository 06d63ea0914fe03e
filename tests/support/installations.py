"""A database that a test migrates."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import psycopg
from alembic import command
from alembic.config import Config

from outbox_worker.database.engine import Database
from outbox_worker.decision import Limits
from outbox_worker.model import COLUMNS, Guard, Outcome
from outbox_worker.schema import migrate as migration
from outbox_worker.schema.migrate import VERSION_TABLE, Migrated
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import OWNERSHIP_LIST, build_tables
from outbox_worker.settings import load_settings
from outbox_worker.settle.isolation import Isolation
from outbox_worker.settle.pacing import Pacing
from outbox_worker.settle.processor import Processor
from outbox_worker.store.doors import Doors
from outbox_worker.store.guard import GuardWatch, probe_guard
from outbox_worker.store.workers import Workers
from outbox_worker.telemetry.reporter import Telemetry
from tests.support import ROOT, catalogue
from tests.support.factories import drain_all, make_payments

OWN = {f"public.{role}" for role in COLUMNS}

SHOPS_PURCHASES = """
    CREATE TABLE purchases (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        student_id uuid NOT NULL,
        course_id uuid NOT NULL,
        payment_id uuid CONSTRAINT one_per_payment UNIQUE,
        amount numeric(10,2) NOT NULL,
        currency char(3) NOT NULL DEFAULT 'USD',
        is_active boolean NOT NULL DEFAULT true,
        created_at timestamptz NOT NULL DEFAULT now(),
        deactivated_at timestamptz,
        sales_channel varchar(20) NOT NULL DEFAULT 'web' CHECK (sales_channel <> ''),
        tenant int NOT NULL DEFAULT 1
    );
    CREATE INDEX shop_by_course ON purchases (course_id, created_at DESC) WHERE is_active;
    COMMENT ON TABLE purchases IS 'the shop''s own';
    CREATE FUNCTION shop_touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER touch BEFORE UPDATE ON purchases FOR EACH ROW EXECUTE FUNCTION shop_touch();
    INSERT INTO purchases (student_id, course_id, payment_id, amount)
    SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 9.90 FROM generate_series(1, 3);
"""

SHOPS_PAYMENTS = """
    CREATE TABLE payments (
        id uuid PRIMARY KEY,
        user_id bigint NOT NULL,
        course_id text NOT NULL,
        amount numeric(10,2) NOT NULL,
        currency char(3) NOT NULL,
        status text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
"""


class Installation:
    """One database that a test migrates, with a connection to read it."""

    def __init__(self, url: str, connection: psycopg.Connection[Any]) -> None:
        self.url = url
        self.connection = connection
        self.settings: dict[str, Any] = {}

    def migrate(self, *options: str) -> Migrated:
        settings = load_settings(database_url=self.url, **self.settings)
        database = Database(settings, deadline_seconds=None)
        try:
            return migration.upgrade(database, settings, build_tables(settings), options)
        finally:
            database.close()

    def alembic(self, run: Callable[..., object], *arguments: str) -> str:
        """Run a command of plain alembic in this process, and return what it prints."""
        printed = io.StringIO()
        settings = load_settings(database_url=self.url, **self.settings)
        database = Database(settings, deadline_seconds=None)
        try:
            with database.engine.connect() as connection:
                config = Config(ROOT / "alembic.ini", stdout=printed)
                config.attributes.update(connection=connection, settings=settings)
                run(config, *arguments)
        finally:
            database.close()
        return printed.getvalue()

    def downgrade(self, branch: str) -> None:
        self.alembic(command.downgrade, f"{branch}@base")

    def make_named_payments(self) -> None:
        """Create the payments table under the name from the settings."""
        settings = load_settings(database_url=self.url, **self.settings)
        database = Database(settings, deadline_seconds=None)
        try:
            make_payments(database, build_tables(settings))
        finally:
            database.close()

    def drain(self) -> dict[Outcome, int]:
        """Settle all due events. Return the number of each outcome."""
        settings = load_settings(database_url=self.url, **self.settings)
        database, telemetry = Database(settings, deadline_seconds=10), Telemetry()
        with database.transaction() as session:
            tables = check_schema(session, build_tables(settings))
        watch, doors = GuardWatch(tables.purchases, telemetry.guard_changed), Doors.of(tables, None)
        pacing = Pacing(Limits(settings.retry_policy, 100, 60))
        isolation = Isolation(database, Workers(tables, uuid4()))
        try:
            watch.know(tables)
            with database.transaction() as session:
                watch.probe(session)
            return drain_all(Processor(database, doors, watch, telemetry, pacing, isolation, lambda: None))
        finally:
            database.close()

    def guard(self) -> Guard:
        settings = load_settings(database_url=self.url, **self.settings)
        database = Database(settings, deadline_seconds=None)
        try:
            with database.transaction() as session:
                return probe_guard(session, build_tables(settings).purchases).guard
        finally:
            database.close()

    def execute(self, statement: str, *values: Any) -> list[Any]:
        cursor = self.connection.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []

    def tables(self) -> set[str]:
        return catalogue.tables(self.connection)

    def own_tables(self) -> set[str]:
        return self.tables() - {f"public.{VERSION_TABLE}", f"public.{OWNERSHIP_LIST}"}

    def snapshot(self) -> dict[str, Any]:
        return catalogue.snapshot(self.connection)

    def indexes(self, table: str = "purchases") -> dict[str, bool]:
        """Return the name of each index, and whether the index is valid."""
        return {row[0]: row[2] for row in catalogue.describe(self.connection, table)["indexes"]}

    def revisions(self) -> set[str]:
        return {revision for (revision,) in self.execute(f"SELECT version_num FROM {VERSION_TABLE}")}
