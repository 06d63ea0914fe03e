"""Migrations up and down, on empty databases, full ones and adopted ones, and two at once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from alembic.config import Config

from outbox_worker.errors import SchemaError, SettingError
from outbox_worker.model import COLUMNS, Guard
from outbox_worker.schema.migrate import VERSION_TABLE
from outbox_worker.schema.tables import OWNERSHIP_LIST, PAIR_INDEX
from tests.support import ROOT, servers
from tests.support.factories import Shop
from tests.support.installations import OWN, Installation


def fill(shop: Shop) -> None:
    """Write at least one row in every table."""
    payment, event_id = shop.paid()
    shop.purchase(payment)
    shop.mark(event_id)
    shop.dead_letter(payment)
    shop.rows("INSERT INTO workers (id, host, pid, version, guard) VALUES (%s, 'h', 1, '0', 'index')", uuid4())
    shop.rows(
        "INSERT INTO backfill_runs (id, kind, cutoff, is_full, host, pid, actor)"
        " VALUES (%s, 'operator', clock_timestamp(), true, 'h', 1, 'somebody')",
        uuid4(),
    )


# --- core


def test_an_empty_database_gets_all_tables_and_says_so(empty: Installation) -> None:
    done = empty.migrate()
    assert empty.own_tables() == OWN
    assert len(done.created) == len(OWN)
    assert done.adopted == ()
    assert empty.guard() is Guard.LOCK


def test_twice_changes_nothing(empty: Installation) -> None:
    empty.migrate("unique_index", "notify")
    before = empty.snapshot()
    done = empty.migrate("unique_index", "notify")
    assert done.created == ()
    assert empty.snapshot() == before


def test_a_table_that_was_dropped_is_not_said_to_be_created(migrated: Installation) -> None:
    migrated.execute("DROP TABLE dead_letters")
    with pytest.raises(SchemaError, match=r"no public\.dead_letters"):
        migrated.migrate()
    assert migrated.own_tables() == OWN - {"public.dead_letters"}


def test_a_new_table_of_a_given_name_is_told_apart(empty: Installation) -> None:
    """If the user meant an existing table, its name was mistyped.

    The output must say that a new one was made.
    """
    empty.settings = {"tables": "outbox=events"}
    assert empty.migrate().named == ("public.events",)


def test_payments_that_are_named_and_absent_stop_it_before_anything_is_made(empty: Installation) -> None:
    """An empty table with a mistyped name would turn every event into a dead letter."""
    empty.settings = {"tables": "payments=paymentz"}
    with pytest.raises(SettingError, match=r"public\.paymentz.*Nothing was changed"):
        empty.migrate("unique_index")
    assert empty.tables() == set()


def test_the_version_table_is_our_own_and_the_shops_is_left_alone(empty: Installation) -> None:
    empty.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    empty.execute("INSERT INTO alembic_version VALUES ('the_shops')")
    before = empty.snapshot()["public.alembic_version"]
    empty.migrate()
    assert empty.revisions() == {"core_0007"}
    assert empty.snapshot()["public.alembic_version"] == before
    empty.downgrade("core")
    assert empty.snapshot()["public.alembic_version"] == before


def test_down_on_empty_tables_leaves_nothing(migrated: Installation) -> None:
    migrated.downgrade("core")
    assert migrated.own_tables() == set()
    assert migrated.revisions() == set()
    migrated.migrate()
    assert migrated.own_tables() == OWN


def test_down_on_full_tables_loses_no_row_and_up_again_finds_them(migrated: Installation, stock: Shop) -> None:
    fill(stock)
    before = migrated.snapshot()
    migrated.downgrade("core")
    migrated.migrate()
    after = migrated.snapshot()
    made_again = f"public.{OWNERSHIP_LIST}"
    assert after.pop(made_again)["rows"] == before.pop(made_again)["rows"]
    assert after == before


def test_an_installation_of_the_first_revision_gets_what_came_since(migrated: Installation, stock: Shop) -> None:
    """The migrations alter the worker's own tables.

    Old tables that do not fit yet are no reason to refuse.
    """
    fill(stock)
    stock.rows("ALTER TABLE workers DROP COLUMN succeeded_at")
    stock.rows("DROP TABLE backfill_runs")
    stock.rows("UPDATE outbox_worker_alembic_version SET version_num = 'core_0001' WHERE version_num = 'core_0007'")
    assert migrated.migrate().created == ("public.backfill_runs",)
    assert stock.rows("SELECT succeeded_at FROM workers") == [(None,)]


def test_a_table_of_ours_that_was_spoilt_is_told_after_the_migrations(migrated: Installation, stock: Shop) -> None:
    stock.rows("ALTER TABLE workers DROP COLUMN guard")
    with pytest.raises(SchemaError, match=r"but tables do not fit.*\n.*workers\.guard is missing"):
        migrated.migrate()


@pytest.mark.parametrize("kept", COLUMNS)
def test_down_keeps_just_the_table_that_holds_a_row(migrated: Installation, stock: Shop, kept: str) -> None:
    fill(stock)
    for role in set(COLUMNS) - {kept}:
        stock.rows(f"DELETE FROM {role}")
    migrated.downgrade("core")
    assert migrated.own_tables() == {f"public.{kept}"}
    assert stock.count(kept) == 1


# --- two at once


PROCESS = """
import sys
from outbox_worker.schema import migrate as migration
from outbox_worker.database.engine import Database
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import load_settings
from outbox_worker.telemetry.reporter import Telemetry
settings = load_settings(database_url=sys.argv[1])
database = Database(settings, deadline_seconds=None)
print("ready", flush=True)
sys.stdin.readline()
print(len(migration.upgrade(database, settings, build_tables(settings), ("unique_index", "notify")).created))
"""


def test_two_processes_at_once_on_an_empty_database(empty: Installation, request: pytest.FixtureRequest) -> None:
    """The test needs processes, because two threads cannot share alembic's globals."""
    both = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, empty.url],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        request.addfinalizer(process.kill)
        both.append(process)
    for process in both:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted(int(created) for created, _ in told) == [0, len(OWN)]
    assert empty.own_tables() == OWN
    assert empty.guard() is Guard.INDEX


def test_a_second_migration_does_not_hinder_the_first_ones_concurrent_build(migrated: Installation) -> None:
    """CREATE INDEX CONCURRENTLY waits for every older snapshot.

    A migration that waits for the lock of the first must not hold a snapshot.
    """
    with ThreadPoolExecutor(2) as pool, psycopg.connect(servers.libpq(migrated.url)) as holder:
        holder.execute("LOCK TABLE purchases IN SHARE MODE")  # the first build waits here with its lock
        both = [pool.submit(migrated.migrate, "unique_index") for _ in range(2)]
        deadline = monotonic() + 10
        building = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ~ 'CONCURRENTLY'"
        while not (migrated.execute(f"{building} AND wait_event_type = 'Lock' AND pid <> pg_backend_pid()")[0][0]):
            assert monotonic() < deadline, "nobody builds"
        holder.rollback()
        for each in both:
            each.result(timeout=30)
    assert migrated.indexes()[PAIR_INDEX] is True
    assert migrated.guard() is Guard.INDEX


# --- plain alembic


def test_plain_alembic_is_enough_to_run(empty: Installation) -> None:
    """Run the command as a user types it in the top folder of a checkout."""
    done = subprocess.run(
        [Path(sys.executable).with_name("alembic"), "upgrade", "core@head"],
        cwd=ROOT,
        env=os.environ | {"OUTBOX_DATABASE_URL": empty.url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert empty.own_tables() == OWN
    assert empty.revisions() == {"core_0007"}


def test_plain_alembic_reads_the_settings(empty: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", empty.url)
    monkeypatch.setenv("OUTBOX_TABLES", "payments=billing.payment")
    command.upgrade(Config(ROOT / "alembic.ini"), "core@head")
    assert empty.own_tables() == OWN - {"public.payments"} | {"billing.payment"}
    command.downgrade(Config(ROOT / "alembic.ini"), "core@base")
    assert empty.own_tables() == set()


def test_plain_alembic_without_a_database_says_what_to_set() -> None:
    with pytest.raises(SettingError, match="OUTBOX_DATABASE_URL is not set"):
        command.upgrade(Config(ROOT / "alembic.ini"), "core@head")


def test_there_is_no_offline_mode() -> None:
    with pytest.raises(SystemExit, match="offline"):
        command.upgrade(Config(ROOT / "alembic.ini"), "core@head", sql=True)


# --- other names


def test_every_table_and_column_in_a_schema_of_its_own(empty: Installation) -> None:
    empty.settings = {
        "schema": "work",
        "tables": {role: f'billing.The "{role}"' if role == "payments" else f"The {role}" for role in COLUMNS},
        "columns": {f"{role}.{key}": f"Select {key}" for role, keys in COLUMNS.items() for key in keys},
    }
    empty.make_named_payments()
    done = empty.migrate("unique_index", "notify")
    assert len(done.created) == len(COLUMNS) - 1
    assert done.adopted == ('billing."The ""payments"""',)
    expected = {'billing.The "payments"'} | {f"work.The {role}" for role in set(COLUMNS) - {"payments"}}
    assert empty.tables() == expected | {f"work.{VERSION_TABLE}", f"work.{OWNERSHIP_LIST}"}
    assert empty.guard() is Guard.INDEX
    assert empty.migrate("unique_index", "notify").created == ()
    for branch in ("notify", "unique_index", "core"):
        empty.downgrade(branch)
    assert empty.tables() == {f"work.{VERSION_TABLE}", 'billing.The "payments"'}
