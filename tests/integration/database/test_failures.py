"""Every class of failure, provoked on a real server: ``classify`` knows the driver's report."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import Failure, classify, is_trouble, sqlstate
from outbox_worker.settings import load_settings
from tests.support.makers import Connect, MakeDatabase
from tests.support.sites import Site

SCRIPTS: dict[str, tuple[Failure, str]] = {
    "57014": (Failure.RETRY, "SET LOCAL statement_timeout = '20ms'; SELECT pg_sleep(5)"),
    "55P03": (Failure.RETRY, "SET LOCAL lock_timeout = '20ms'; LOCK TABLE held"),
    "25006": (Failure.RECONNECT, "SET TRANSACTION READ ONLY; INSERT INTO numbers VALUES (1)"),
    "26000": (Failure.RECONNECT, "EXECUTE nothing"),
    "42P05": (Failure.RECONNECT, "PREPARE same AS SELECT 1; PREPARE same AS SELECT 1"),
    "53400": (Failure.PAUSE, "SET LOCAL temp_file_limit = 1; SET LOCAL work_mem = 64; TABLE many ORDER BY n DESC"),
    "58P01": (Failure.PAUSE, "LOAD 'no_such_library'"),
    "2200H": (Failure.PAUSE, "CREATE SEQUENCE short MAXVALUE 2; SELECT nextval('short') FROM generate_series(1, 3)"),
    "22012": (Failure.EVENT, "SELECT 1 / 0"),
    "22003": (Failure.EVENT, "SELECT CAST(1e10 AS numeric(4, 2))"),
    "22P02": (Failure.EVENT, "SELECT CAST('no' AS uuid)"),
    "23001": (
        Failure.EVENT,
        "CREATE TABLE child (n int REFERENCES numbers ON DELETE RESTRICT); INSERT INTO numbers VALUES (7);"
        " INSERT INTO child VALUES (7); DELETE FROM numbers WHERE n = 7",
    ),
    "23502": (Failure.EVENT, "INSERT INTO numbers VALUES (NULL)"),
    "23503": (Failure.EVENT, "CREATE TABLE child (n int REFERENCES numbers); INSERT INTO child VALUES (99)"),
    "23514": (Failure.EVENT, "INSERT INTO numbers VALUES (-1)"),
    "23P01": (
        Failure.EVENT,
        "CREATE TABLE apart (n int, EXCLUDE USING btree (n WITH =)); INSERT INTO apart VALUES (1), (1)",
    ),
    "44000": (
        Failure.EVENT,
        "CREATE VIEW small AS SELECT n FROM numbers WHERE n < 5 WITH CHECK OPTION; INSERT INTO small VALUES (50)",
    ),
    "P0001": (Failure.EVENT, "DO $$ BEGIN RAISE EXCEPTION 'no'; END $$"),
    "54000": (
        Failure.EVENT,
        "CREATE TABLE long (t text PRIMARY KEY); INSERT INTO long"
        " SELECT string_agg(md5(CAST(n AS text)), '') FROM generate_series(1, 9000) AS n",
    ),
    "54001": (
        Failure.EVENT,
        "CREATE FUNCTION deeper(n int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN deeper(n + 1); END $$;"
        " SELECT deeper(1)",
    ),
    "42P10": (Failure.GUARD, "INSERT INTO plain VALUES (1) ON CONFLICT (n) DO NOTHING"),
    "23505": (Failure.GUARD, "INSERT INTO numbers VALUES (2), (2)"),
    "55000": (
        Failure.GUARD,
        "CREATE TABLE later (n int UNIQUE DEFERRABLE); INSERT INTO later VALUES (1) ON CONFLICT (n) DO NOTHING",
    ),
    "42501": (Failure.UNCLEAR, "SET LOCAL ROLE pg_monitor; TABLE numbers"),
    "42P01": (Failure.UNCLEAR, "TABLE nothing"),
    "42703": (Failure.UNCLEAR, "SELECT nothing FROM numbers"),
}
"""The scripts by SQLSTATE. The last statement of a script fails with that state."""

BEFORE_18 = {"23001": "23503"}
"""ON DELETE RESTRICT has its own state only in PostgreSQL 18 and later."""

RAISED = ("08000", "53100", "58030", "XX000")
"""States that a test's server cannot reach, such as a full disk. A script raises them."""


@pytest.fixture
def stage(database: Database, connect: Connect) -> Database:
    """Make tables to fail on. Another session has locked one of them."""
    owner = connect(autocommit=True)
    owner.execute("CREATE TABLE numbers (n int PRIMARY KEY CHECK (n > 0)); CREATE TABLE plain (n int)")
    owner.execute("CREATE TABLE held (n int); CREATE TABLE many AS SELECT n FROM generate_series(1, 100000) AS n")
    connect().execute("LOCK TABLE held")
    return database


def fail(database: Database, script: str) -> DBAPIError:
    with pytest.raises(DBAPIError) as caught, database.transaction() as session:
        session.connection().exec_driver_sql(script)
    return caught.value


@pytest.mark.parametrize("state", SCRIPTS)
def test_what_a_statement_meets(state: str, stage: Database) -> None:
    expected, script = SCRIPTS[state]
    error = fail(stage, script)
    assert sqlstate(error) in (state, BEFORE_18.get(state))
    assert classify(error) is expected


def test_53200_a_full_lock_table(site: Site) -> None:
    """The test uses a server of its own, because all databases of a server share one lock table."""
    with site.connect() as connection, pytest.raises(psycopg.errors.OutOfMemory) as caught:
        connection.execute("SELECT pg_advisory_xact_lock(n) FROM generate_series(1, 1000000) AS n")
    assert (sqlstate(caught.value), classify(caught.value)) == ("53200", Failure.PAUSE)


@pytest.mark.parametrize("state", RAISED)
def test_what_a_function_raises_may_be_the_fault_of_one_row(state: str, stage: Database) -> None:
    error = fail(stage, f"DO $x$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $x$")
    assert (sqlstate(error), classify(error)) == (state, Failure.UNCLEAR)
    assert is_trouble(error)


def test_40001_two_updates_of_one_snapshot(stage: Database, connect: Connect) -> None:
    owner = connect(autocommit=True)
    owner.execute("INSERT INTO numbers VALUES (1)")
    with Session(stage.engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        session.execute(text("SELECT count(*) FROM numbers"))
        owner.execute("UPDATE numbers SET n = 3")
        with pytest.raises(DBAPIError) as caught:
            session.execute(text("UPDATE numbers SET n = 4"))
    assert (sqlstate(caught.value), classify(caught.value)) == ("40001", Failure.RETRY)


def test_40p01_two_orders_of_two_locks(stage: Database, connect: Connect) -> None:
    other = connect()
    other.execute("SELECT pg_advisory_xact_lock(2)")
    crossing: list[BaseException] = []

    def cross() -> None:
        try:
            other.execute("SELECT pg_advisory_xact_lock(1)")
        except psycopg.Error as error:
            crossing.append(error)

    thread = threading.Thread(target=cross)
    try:
        with stage.transaction() as session:
            session.execute(text("SET LOCAL lock_timeout = 0"))
            session.execute(text("SELECT pg_advisory_xact_lock(1)"))
            thread.start()
            session.execute(text("SELECT pg_advisory_xact_lock(2)"))
    except DBAPIError as error:
        crossing.append(error)
    other.rollback()
    thread.join()
    (deadlock,) = crossing
    assert (sqlstate(deadlock), classify(deadlock)) == ("40P01", Failure.RETRY)


@pytest.mark.usefixtures("stage")
def test_0a000_a_plan_whose_result_changed(connect: Connect, make_database: MakeDatabase) -> None:
    database = make_database(connections=1)
    for _ in range(8):
        with database.transaction() as session:
            session.execute(text("SELECT * FROM plain"))
    connect(autocommit=True).execute("ALTER TABLE plain ADD COLUMN more text")
    error = fail(database, "SELECT * FROM plain")
    assert (sqlstate(error), classify(error)) == ("0A000", Failure.RECONNECT)
    with database.transaction() as session:
        session.execute(text("SELECT * FROM plain"))


def _pause_after(database: Database, statement: str) -> None:
    with database.transaction() as session:
        session.execute(text(statement))
        threading.Event().wait(0.3)
        session.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    ("state", "how"),
    [
        ("57P01", "SELECT pg_terminate_backend(pg_backend_pid())"),
        ("25P03", "SET LOCAL idle_in_transaction_session_timeout = '20ms'"),
    ],
)
def test_a_connection_that_the_server_ends_is_replaced(state: str, how: str, stage: Database) -> None:
    with pytest.raises(DBAPIError) as caught:
        _pause_after(stage, how)
    assert sqlstate(caught.value) in (state, None), "the reason may be lost with the connection"
    assert classify(caught.value) is Failure.RECONNECT
    assert caught.value.connection_invalidated
    with stage.transaction() as session:
        assert session.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("change", [{"database": "nowhere"}, {"username": "nobody"}, {"port": 1}])
def test_a_connection_that_is_never_made(change: dict[str, Any], database_url: str) -> None:
    url = make_url(database_url).set(**change)
    if "port" in change:
        url = url.set(query={key: value for key, value in url.query.items() if key != "port"})
    database = Database(load_settings(database_url=url.render_as_string(hide_password=False)), deadline_seconds=2)
    with pytest.raises(DBAPIError) as caught, database.transaction():
        pass
    database.close()
    assert sqlstate(caught.value) is None
    assert classify(caught.value) is Failure.RECONNECT
