"""A database that is missing or incomplete: exit codes, and sentences with the remedy."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from tests.support import servers
from tests.support.commands import ONE_SHOT, PASSWORD, fails
from tests.support.factories import Shop
from tests.support.processes import (
    eventually,
    finish,
    start,
)


def url_of(database_url: str, **changes: Any) -> str:
    return make_url(database_url).set(**changes).render_as_string(hide_password=False)


# --- a missing database


@pytest.mark.parametrize("command", ONE_SHOT, ids=" ".join)
def test_nobody_listens(command: list[str], closed_port: int) -> None:
    url = f"postgresql://me:{PASSWORD}@127.0.0.1:{closed_port}/shop"
    fails(69, "No connection to the database", str(closed_port), done=finish(*command, url=url))


def test_the_database_does_not_exist(database_url: str) -> None:
    url = url_of(database_url, database="no_such_database", password=PASSWORD)
    fails(69, "no_such_database", done=finish("run", "--drain", url=url))
    fails(69, "no_such_database", done=finish("status", url=url))


def test_a_role_that_does_not_exist(database_url: str) -> None:
    fails(69, "No connection", done=finish("run", "--drain", url=url_of(database_url, username="no_such_role")))


def test_a_wrong_password(role: str, database_url: str) -> None:
    url = url_of(database_url, username=role, password=PASSWORD)
    try:
        psycopg.connect(servers.libpq(url)).close()
    except psycopg.OperationalError:
        fails(69, "password", done=finish("run", "--drain", url=url))
        fails(69, "password", done=finish("audit", url=url))
    else:
        pytest.skip("this server trusts everybody")


def test_the_daemon_waits_for_an_absent_database_and_begins_when_it_comes(server: servers.Server) -> None:
    name = f"{server.run}_late_{uuid4().hex[:8]}"
    url = servers.with_database(server.url, name)
    try:
        with start("run", url=url) as process:
            process.wait_for("paused")
            assert process.popen.poll() is None
            server.create(name, "index")
            process.wait_for("worker_started")
            with psycopg.connect(servers.libpq(url), autocommit=True) as connection:
                shop = Shop(connection)
                _, event = shop.paid()
                eventually(lambda: shop.outcome_of(event) == "created", "the first event is settled")
            process.signal()
            assert process.wait() == 0, process.stderr
            assert "Traceback" not in process.stderr
    finally:
        server.drop(name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_that_waits_can_be_stopped(number: int, closed_port: int) -> None:
    with start("run", url=f"postgresql://me:{PASSWORD}@127.0.0.1:{closed_port}/shop") as process:
        process.wait_for("paused")
        process.signal(number)
        assert process.wait(10) == 0, process.stderr
        assert PASSWORD not in process.stderr
        assert "Traceback" not in process.stderr


# --- an incomplete database


@pytest.fixture
def role(server: servers.Server) -> Iterator[str]:
    """Make a role that can only log in.

    Ask for it before the database that grants it a privilege.
    """
    name = f"{server.run}_{uuid4().hex[:8]}"
    with psycopg.connect(servers.libpq(server.url), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'right'").format(sql.Identifier(name)))
    yield name
    with psycopg.connect(servers.libpq(server.url), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_an_empty_database(make_url: Callable[[str | None], str]) -> None:
    url = make_url(None)
    tables = ("payments", "outbox", "purchases", "processed_events", "dead_letters", "workers", "backfill_runs")
    for command in (["run"], ["run", "--drain"], ["status"]):
        sentence = fails(78, *tables, "outbox-worker migrate", done=finish(*command, url=url))
        assert sentence.count("\n") == 2, "one finding, one remedy"
    for command in (["audit"], ["backfill", "--dry-run"]):
        fails(78, *tables[:5], "outbox-worker migrate", done=finish(*command, url=url))
    fails(78, "dead_letters", "outbox-worker migrate", done=finish("dead-letters", "list", url=url))


def test_a_schema_that_is_not_there(database_url: str) -> None:
    fails(
        78, r"missing: nowhere\.payments", "migrate", done=finish("run", "--drain", url=database_url, schema="nowhere")
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DROP TABLE processed_events", [r"this table is missing: public\.processed_events", "migrate"]),
        ("ALTER TABLE outbox DROP COLUMN last_error", [r"outbox\.last_error is missing", "ADD COLUMN last_error TEXT"]),
        ("ALTER TABLE outbox ALTER payload TYPE bytea USING ''", [r"outbox\.payload is bytea, not", "OUTBOX_COLUMNS"]),
        ("ALTER TABLE purchases ALTER is_active DROP DEFAULT, ALTER is_active TYPE text", [r"is_active is text"]),
        ("ALTER TABLE purchases ADD tutor text NOT NULL", [r"tutor must have a value", "DROP NOT NULL"]),
        ("ALTER TABLE processed_events DROP CONSTRAINT processed_events_pkey", ["not unique", "ADD UNIQUE"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_that_lacks_something(change: str, said: list[str], database_url: str, shop: Shop) -> None:
    if "is_active TYPE" in change:
        shop.rows("DROP INDEX purchases_active_student_course_key")
    shop.rows(change)
    fails(78, *said, done=finish("run", "--drain", url=database_url))
    fails(78, *said, done=finish("run", url=database_url))


def test_all_that_is_missing_is_told_at_once(database_url: str, shop: Shop) -> None:
    shop.rows("DROP TABLE workers")
    shop.rows("ALTER TABLE outbox DROP COLUMN crashes")
    fails(78, "workers", r"outbox\.crashes", done=finish("run", "--drain", url=database_url))


def test_a_role_without_rights_and_the_remedy_that_helps(role: str, database_url: str, shop: Shop) -> None:
    """A person carries out what the sentences say. Then the command runs."""
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    shop.paid()
    done = finish("run", "--drain", url=url)
    for _ in range(2):
        if done.code == 0:
            break
        sentence = fails(78, "GRANT", done=done)
        for grant in re.findall(r"GRANT [^;]+;", sentence):
            shop.rows(re.sub(r"<the worker's role>|CURRENT_USER", f'"{role}"', grant))
        done = finish("run", "--drain", url=url)
    assert done.code == 0, done.stderr
    assert (shop.count("outbox"), shop.count("purchases")) == (0, 1)


def test_one_privilege_missing(role: str, database_url: str, shop: Shop) -> None:
    shop.rows(f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{role}"')
    shop.rows(f'REVOKE DELETE ON outbox FROM "{role}"')
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    sentence = fails(78, "no DELETE on public.outbox", "GRANT DELETE", done=finish("run", "--drain", url=url))
    assert "purchases" not in sentence


def test_a_right_that_is_lost_while_it_runs_is_told_with_its_remedy(role: str, database_url: str, shop: Shop) -> None:
    shop.rows(f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{role}"')
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    with start("run", url=url) as process:
        process.wait_for("worker_started")
        shop.rows(f'REVOKE DELETE ON outbox FROM "{role}"')
        _, event = shop.paid()
        told = process.wait_for("schema_problems")
        assert told["level"] == "ERROR"
        assert re.search(r"no DELETE on public\.outbox\n.*GRANT DELETE ON public\.outbox TO ", told["problems"])
        shop.rows(f'GRANT DELETE ON outbox TO "{role}"')
        eventually(lambda: shop.outcome_of(event) == "created", "it goes on by itself")
        process.signal()
        assert process.wait() == 0


def test_a_unique_key_that_is_lost_while_it_runs_is_told_with_its_remedy(database_url: str, shop: Shop) -> None:
    with start("run", url=database_url) as process:
        process.wait_for("worker_started")
        shop.rows("ALTER TABLE purchases DROP CONSTRAINT purchases_payment_id_key")
        refunded = shop.refund(shop.payment())
        paused = process.wait_for("paused")
        assert (paused["level"], paused["failure"]) == ("ERROR", "pause")
        told = process.wait_for("schema_problems")
        assert "public.purchases.payment_id is not unique" in told["problems"]
        _, confirmed = shop.paid()
        eventually(lambda: shop.outcome_of(confirmed) == "created", "purchases are made meanwhile")
        (remedy,) = re.findall(r"ALTER TABLE [^;]+;", told["problems"])
        shop.rows(remedy)
        eventually(lambda: shop.outcome_of(refunded) == "revoked", "it goes on by itself")
        process.signal()
        assert process.wait() == 0


@pytest.mark.parametrize("command", ["status --json", "audit", "dead-letters list"])
def test_who_only_looks_needs_to_read_and_no_more(command: str, role: str, database_url: str, shop: Shop) -> None:
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    sentence = fails(78, "GRANT SELECT ON public.dead_letters", done=finish(*command.split(), url=url))
    assert not re.search("INSERT|UPDATE|DELETE", sentence)
    for grant in re.findall(r"GRANT [^;]+;", sentence):
        shop.rows(grant)
    done = finish(*command.split(), url=url)
    assert done.code == 0, done
    assert command != "status --json" or done.object["guard"] == "index"


def test_migrate_as_the_workers_role(role: str, database_url: str) -> None:
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    fails(78, "may not migrate the database", "run migrate as postgres", done=finish("migrate", url=url))


def test_an_empty_outbox_is_not_late(database_url: str, shop: Shop) -> None:
    shop.paid(due_in="1 hour")
    found = finish("status", "--json", url=database_url).object
    assert found["backlog"] == {"due": 0, "waiting": 1, "oldest_due_seconds": 0.0}
    assert found["metrics"]["outbox_oldest_due_seconds"] == 0.0
