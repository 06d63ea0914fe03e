"""The migrations make exactly what ``schema.py`` says, down to each default and predicate.

PostgreSQL prints two databases: the migrated one, and one made from the metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.schema import CreateSchema

from outbox_worker.database.engine import Database
from outbox_worker.model import COLUMNS
from outbox_worker.schema import migrate as migration
from outbox_worker.schema.tables import PAIR_LOOKUP_INDEX, build_tables, relation_name
from outbox_worker.settings import load_settings
from tests.support import catalogue, servers

COMPARED = ("columns", "constraints", "indexes")

Shape = dict[str, dict[str, Any]]


def shape(url: str, **named: Any) -> Shape:
    """Return columns, constraints and indexes of the tables, by role."""
    tables = build_tables(load_settings(**named)).by_role()
    with psycopg.connect(servers.libpq(url)) as connection:
        described = {role: catalogue.describe(connection, relation_name(table)) for role, table in tables.items()}
    return {role: {what: found[what] for what in COMPARED} for role, found in described.items()}


def differences(one: Shape, other: Shape) -> set[str]:
    """Return ``role.what: row`` for every row that only one of the two shapes has."""
    return {
        f"{role}.{what}: {row}"
        for role in COLUMNS
        for what in COMPARED
        for row in {*one[role][what]} ^ {*other[role][what]}
    }


def make_from_metadata(url: str, **named: Any) -> None:
    metadata = build_tables(load_settings(**named)).metadata
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            for schema in {table.schema for table in metadata.tables.values()} - {"public"}:
                connection.execute(CreateSchema(str(schema)))
            metadata.create_all(connection)
    finally:
        engine.dispose()


def migrate(url: str, **named: Any) -> None:
    settings = load_settings(database_url=url, **named)
    database = Database(settings, deadline_seconds=None)
    try:
        migration.upgrade(database, settings, build_tables(settings))
    finally:
        database.close()


RENAMED: dict[str, Any] = {
    "tables": {role: f"work.{role}" if role == "outbox" else f"Our {role}" for role in COLUMNS if role != "payments"},
    "columns": {f"{role}.{key}": f"Select {key}" for role, keys in COLUMNS.items() for key in keys},
}


@pytest.mark.parametrize("named", [{}, RENAMED], ids=["own_names", "other_names"])
def test_migrations_make_what_the_schema_says(make_url: Callable[[str | None], str], named: dict[str, Any]) -> None:
    """Only the look-up index differs: ``unique_index`` replaces it, the schema leaves it out."""
    migrated, declared = make_url(None), make_url(None)
    migrate(migrated, **named)
    make_from_metadata(declared, **named)
    found = shape(migrated, **named)
    assert all(found[role][what] for role in COLUMNS for what in COMPARED if what != "indexes" or role != "workers")
    apart = differences(found, shape(declared, **named))
    assert len(apart) == 1, apart
    assert PAIR_LOOKUP_INDEX in apart.pop()


def test_the_look_up_index_serves_the_pair(make_url: Callable[[str | None], str]) -> None:
    definition = {name: sql for name, sql, _ in shape(make_url("lock"))["purchases"]["indexes"]}[PAIR_LOOKUP_INDEX]
    assert definition.endswith("ON public.purchases USING btree (student_id, course_id) WHERE is_active")
    assert "UNIQUE" not in definition


def test_defaults_let_a_producer_write_the_least(make_url: Callable[[str | None], str]) -> None:
    """The payments service must write only these columns."""
    with psycopg.connect(servers.libpq(make_url("lock"))) as connection:
        connection.execute(
            "INSERT INTO payments (student_id, course_id, amount, currency, status)"
            " VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'EUR', 'pending')"
        )
        made = connection.execute(
            "INSERT INTO outbox (event_id, event_type, payload) VALUES (gen_random_uuid(), 'T', '{}')"
            " RETURNING attempts, crashes, due_at <= clock_timestamp(), headers, last_error"
        ).fetchone()
    assert made == (0, 0, True, None, None)


MUTATIONS = [
    "ALTER TABLE payments ALTER amount TYPE numeric(10,2)",
    "ALTER TABLE payments ALTER currency TYPE text",
    "ALTER TABLE payments ALTER created_at TYPE timestamp",
    "ALTER TABLE payments ALTER updated_at SET DEFAULT now()",
    "ALTER TABLE payments DROP CONSTRAINT payments_status_check",
    "ALTER TABLE payments DROP CONSTRAINT payments_status_check,"
    " ADD CONSTRAINT payments_status_check CHECK (status IN ('pending', 'succeeded'))",
    "ALTER TABLE outbox ALTER id DROP IDENTITY",
    "ALTER TABLE outbox ALTER headers SET NOT NULL",
    "ALTER TABLE outbox ALTER attempts DROP DEFAULT",
    "ALTER TABLE outbox DROP CONSTRAINT outbox_event_id_key",
    "DROP INDEX outbox_due_idx",
    "DROP INDEX outbox_due_idx; CREATE INDEX outbox_due_idx ON outbox (id, due_at)",
    "DROP INDEX dead_letters_open_idx; CREATE INDEX dead_letters_open_idx ON dead_letters (dead_at, event_id)",
    "ALTER TABLE purchases ALTER payment_id SET NOT NULL",
    "ALTER TABLE purchases ALTER is_active DROP DEFAULT",
    "ALTER TABLE purchases ADD note text",
    "ALTER TABLE processed_events DROP CONSTRAINT processed_events_pkey",
    "ALTER TABLE workers DROP metrics, ADD metrics jsonb NOT NULL DEFAULT '[]'",
]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_can_fail(make_url: Callable[[str | None], str], mutation: str) -> None:
    url = make_url("lock")
    before = shape(url)
    assert differences(before, shape(url)) == set()
    with psycopg.connect(servers.libpq(url)) as connection:
        connection.execute(mutation)
    assert differences(before, shape(url)) != set()
