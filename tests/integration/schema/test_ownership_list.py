"""Which tables the worker owns: the list or the comment decides.

A table that neither of them names is adopted, and the output says so.
"""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command

from outbox_worker.daemon.worker import Worker
from outbox_worker.database.engine import Database
from outbox_worker.schema.catalogue import adopted_tables, is_list_closed, is_owned
from outbox_worker.schema.tables import OWNED, OWNERSHIP_LIST, build_tables
from outbox_worker.settings import load_settings
from outbox_worker.settle.handlers import HANDLED_TYPES, claimed_types
from tests.support.installations import OWN, Installation

LISTED = f"SELECT table_schema || '.' || table_name FROM {OWNERSHIP_LIST}"
DROP_COMMENTS = "DO $$ DECLARE t text; BEGIN FOR t IN SELECT relname FROM pg_class WHERE relkind = 'r' " + (
    "AND relnamespace = 'public'::regnamespace LOOP EXECUTE format('COMMENT ON TABLE %I IS NULL', t); END LOOP; END $$"
)
"""A restore with --no-comments leaves tables without comments."""


def asked(site: Installation, question: Any, role: str | None = None) -> Any:
    settings = load_settings(database_url=site.url, **site.settings)
    database = Database(settings, deadline_seconds=10)
    try:
        with database.transaction() as session:
            if role:
                session.connection().exec_driver_sql(f"SET LOCAL ROLE {role}")
            return question(session, build_tables(settings))
    finally:
        database.close()


def started(site: Installation) -> None:
    worker = Worker(load_settings(database_url=site.url, http_listen="off", **site.settings))
    try:
        worker.start()
    finally:
        worker._database.close()


def test_the_migrations_list_the_tables_that_they_made(migrated: Installation) -> None:
    assert {name for (name,) in migrated.execute(LISTED)} == OWN


def test_an_adopted_table_is_not_listed(adopting: Installation) -> None:
    adopting.migrate()
    assert {name for (name,) in adopting.execute(LISTED)} == OWN - {"public.purchases"}
    assert asked(adopting, adopted_tables) == ["public.purchases"]


def test_without_comments_the_list_decides(migrated: Installation) -> None:
    migrated.execute(DROP_COMMENTS)
    assert asked(migrated, adopted_tables) == []
    assert asked(migrated, lambda session, tables: claimed_types(session, tables, None)) is None


def test_without_the_list_the_comments_decide(migrated: Installation) -> None:
    migrated.execute(f"DROP TABLE {OWNERSHIP_LIST}")
    assert asked(migrated, adopted_tables) == []


def test_where_neither_tells_the_table_is_adopted_and_that_is_said(
    migrated: Installation, records: list[dict[str, Any]]
) -> None:
    migrated.execute("COMMENT ON TABLE outbox IS NULL")
    migrated.execute(f"DELETE FROM {OWNERSHIP_LIST} WHERE table_name = 'outbox'")
    assert asked(migrated, lambda session, tables: claimed_types(session, tables, None)) == HANDLED_TYPES
    started(migrated)
    (told,) = [record for record in records if record.get("event") == "tables_adopted"]
    assert told["tables"] == ["public.outbox"]
    assert told["ignores_types"] is True


def test_a_worker_on_tables_of_its_own_says_nothing_of_adoption(
    migrated: Installation, records: list[dict[str, Any]]
) -> None:
    started(migrated)
    assert [record for record in records if record.get("event") in ("tables_adopted", "setup_concern")] == []


def test_a_role_that_may_not_read_the_list_goes_by_the_comments(migrated: Installation) -> None:
    migrated.execute("CREATE ROLE reads_no_list; GRANT USAGE ON SCHEMA public TO reads_no_list")
    try:
        assert asked(migrated, lambda session, tables: is_list_closed(session, tables.outbox), "reads_no_list")
        assert asked(migrated, lambda session, tables: is_owned(session, tables.outbox), "reads_no_list")
        migrated.execute("COMMENT ON TABLE outbox IS NULL")
        assert not asked(migrated, lambda session, tables: is_owned(session, tables.outbox), "reads_no_list")
    finally:
        migrated.execute("DROP OWNED BY reads_no_list; DROP ROLE reads_no_list")


def test_a_name_in_the_list_without_a_table_is_no_table_of_ours(migrated: Installation) -> None:
    migrated.execute("DROP TABLE backfill_runs")
    assert not asked(migrated, lambda session, tables: is_owned(session, tables.backfill_runs))


@pytest.mark.parametrize("schema", ["public", 'Own "schema'], ids=["public", "quoted"])
def test_up_and_down_keep_what_is_ours(empty: Installation, schema: str) -> None:
    """An earlier version knows only comments. Therefore the way down writes the comments again."""
    empty.settings = {"schema": schema}
    empty.migrate()
    quoted = schema.replace('"', '""')
    empty.execute(f'COMMENT ON TABLE "{quoted}".purchases IS NULL')
    empty.alembic(command.downgrade, "core_0004")
    described = "SELECT obj_description(c.oid, 'pg_class') FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
    which = f"{described} WHERE nspname = %s AND relname = 'purchases'"
    assert empty.execute(which, schema) == [(OWNED,)]
    assert empty.execute("SELECT count(*) FROM pg_class WHERE relname = %s", OWNERSHIP_LIST) == [(0,)]
    assert empty.migrate().adopted == ()
    assert len(empty.execute(f'SELECT * FROM "{quoted}".{OWNERSHIP_LIST}')) == len(OWN)
