"""deploy/grants.sql: each role can do its work, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from outbox_worker.model import COLUMNS
from outbox_worker.schema.privileges import BACKFILLING, DECIDING, PRIVILEGES, READING, Privileges
from outbox_worker.schema.tables import OWNERSHIP_LIST
from tests.support import servers
from tests.support.factories import Shop
from tests.support.premises import PASSWORD, Premises, opened, settle_in
from tests.support.processes import Given, eventually, finish, start

Granted = set[tuple[str, str, str]]
"""(table, privilege, column). The column is empty if the privilege is on the whole table."""


@pytest.fixture(scope="module")
def premises(server: servers.Server) -> Iterator[Premises]:
    with opened(server) as made:
        settle_in(made, "unique_index", "notify")
        yield made


@pytest.fixture
def empty(server: servers.Server) -> Iterator[Premises]:
    with opened(server) as made:
        yield made


@pytest.fixture
def shop(premises: Premises) -> Iterator[Shop]:
    with premises.shop() as made:
        made.rows(f"TRUNCATE {', '.join(COLUMNS)}")
        yield made


# --- what is granted


def wanted(*privileges: Privileges) -> Granted:
    return {
        (table, privilege, column)
        for each in privileges
        for table, allowed in each.items()
        for privilege, columns in allowed.items()
        for column in columns or [""]
    } | {(OWNERSHIP_LIST, "SELECT", "")}


def granted(premises: Premises, role: str) -> Granted:
    """Return the role's privileges in the catalogue, without those of PUBLIC."""
    with premises.shop() as shop:
        rows = shop.rows(
            "SELECT relname, privilege_type, attname FROM ("
            " SELECT relname, relacl AS acl, '' AS attname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
            " UNION ALL SELECT relname, attacl, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
            " WHERE relnamespace = 'public'::regnamespace) AS every, aclexplode(acl)"
            " WHERE grantee = CAST(%s AS regrole)",
            premises.names[role],
        )
    return {tuple(row) for row in rows}


def test_the_grants_are_those_that_the_commands_ask_for(premises: Premises) -> None:
    assert granted(premises, "worker") == wanted(PRIVILEGES)
    assert granted(premises, "reader") == wanted(READING)
    assert granted(premises, "operator") == wanted(READING, DECIDING, BACKFILLING)


def test_once_more_changes_nothing_and_takes_back_what_is_too_much(premises: Premises) -> None:
    before = {role: granted(premises, role) for role in premises.names}
    for statement in ("GRANT UPDATE, INSERT ON payments TO {}", "GRANT UPDATE (actor) ON dead_letters TO {}"):
        premises.execute(sql.SQL(statement).format(sql.Identifier(premises.names["worker"])))
    assert granted(premises, "worker") > before["worker"]
    said = premises.grant()
    assert {role: granted(premises, role) for role in premises.names} == before
    assert "absent" not in said


def test_as_the_databases_owner_who_is_no_superuser(empty: Premises) -> None:
    boss = f"boss_{uuid4().hex[:8]}"
    empty.execute(f"CREATE ROLE {boss} LOGIN CREATEROLE PASSWORD '{PASSWORD}'")
    url = make_url(empty.url)
    empty.execute(f"ALTER DATABASE {url.database} OWNER TO {boss}")
    as_boss = url.set(username=boss, password=PASSWORD).render_as_string(hide_password=False)
    try:
        assert empty.grant(url=as_boss).count("absent") == len(COLUMNS) + 1, "and the list of our tables"
        empty.set_passwords()
        assert finish("migrate", url=empty.url_of("migrator")).code == 0
        assert "absent" not in empty.grant(url=as_boss)
        assert granted(empty, "worker") == wanted(PRIVILEGES)
    finally:
        empty.execute(f"ALTER DATABASE {url.database} OWNER TO CURRENT_USER")
        empty.execute(f"DROP OWNED BY {boss} CASCADE")
        empty.execute(f"DROP ROLE {boss}")


def test_tables_of_others_under_their_own_names(empty: Premises) -> None:
    """Payments are in a schema of the shop's, with columns that no role needs.

    Sequences make the ids.
    """
    for statement in (
        "CREATE SCHEMA billing",
        "CREATE TABLE billing.payment (id uuid PRIMARY KEY, user_id int, product_id int, amount numeric, currency text,"
        " status text, created_at timestamptz DEFAULT now(), card_number text)",
        "CREATE SCHEMA shop",
        "CREATE TABLE shop.outbox (id bigserial PRIMARY KEY, event_id uuid UNIQUE, event_type text, payload jsonb,"
        " headers jsonb, created_at timestamptz DEFAULT now(), due_at timestamptz DEFAULT now(),"
        " attempts int DEFAULT 0, crashes int DEFAULT 0, last_error text)",
        "CREATE TABLE shop.purchases (id serial PRIMARY KEY, student_id int, course_id int, payment_id uuid UNIQUE,"
        " amount numeric, currency text, is_active bool, created_at timestamptz, deactivated_at timestamptz)",
    ):
        empty.execute(statement)
    names = {"schema": "shop", "payments": "billing.payment"}
    read = "id, user_id, product_id, amount, currency, status, created_at"
    settings: Given = {
        "schema": "shop",
        "tables": "payments=billing.payment",
        "columns": "payments.student_id=user_id,payments.course_id=product_id",
    }
    empty.grant(**names, payments_read=read)
    empty.set_passwords()
    done = finish("migrate", url=empty.url_of("migrator"), **settings)
    assert done.code == 0, done
    empty.grant(**names, payments_read=read)
    paid, event = uuid4(), uuid4()
    empty.execute(f"INSERT INTO billing.payment VALUES ('{paid}', 7, 8, 9.90, 'EUR', 'succeeded', now(), '4711')")
    empty.execute(
        "INSERT INTO shop.outbox (event_id, event_type, payload)"
        f""" VALUES ('{event}', 'PURCHASE_CONFIRMED', '{{"payment_id": "{uuid4()}"}}'),"""
        f""" ('{uuid4()}', 'PURCHASE_CONFIRMED', '{{"payment_id": "{paid}"}}')"""
    )
    worker = empty.url_of("worker")
    assert finish("run", "--drain", url=worker, max_attempts=1, **settings).code == 0
    requeue = ("dead-letters", "requeue", str(event), "--actor", "ann", "--reason", "again")
    done = finish(*requeue, url=empty.url_of("operator"), **settings)
    assert done.code == 0, done
    with psycopg.connect(servers.libpq(worker)) as connection:
        assert connection.execute("SELECT count(*) FROM shop.purchases").fetchone() == (1,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT card_number FROM billing.payment")


# --- what the roles do with their privileges


def expect_fine(premises: Premises, role: str, *arguments: str, **settings: Any) -> dict[str, Any]:
    done = finish(*arguments, "--json", url=premises.url_of(role), **settings)
    assert done.code == 0, done
    return done.object


def write_one_of_everything(shop: Shop) -> None:
    """Write events with every outcome. Then each statement of the worker runs."""
    shop.pay_many(20)
    shop.mark(shop.paid()[1])  # recovered
    shop.paid(status="pending")  # retried
    shop.confirm(shop.payment(), payload="[]")  # dead
    first, _ = shop.paid(due_in="-2 hours")
    shop.paid(student=first.student_id, course=first.course_id, due_in="-1 hour")  # duplicate_payment
    given = shop.payment()
    shop.purchase(given)
    shop.confirm(given)  # already_exists
    shop.paid(status="refunded")  # suppressed
    bought = shop.payment()
    shop.purchase(bought)
    shop.payment("succeeded", *bought.pair)
    shop.refund(bought, due_in="-1 minute")  # revoked, and passed on
    shop.refund(shop.payment())  # revoked, and never made
    asked_again = shop.dead_letter(reason="payment_mismatch")
    shop.confirm(shop.payment(), asked_again)  # closes its dead letter
    buried_again = shop.dead_letter(reason="invalid_payload", state="requeued")
    shop.confirm(shop.payment(), buried_again, payload="[]")  # opens its dead letter again
    shop.rows(
        "INSERT INTO workers (id, host, pid, version, guard, seen_at)"
        " VALUES (gen_random_uuid(), 'elsewhere', 1, '1', 'index', now() - interval '1 hour')"
    )  # the worker takes this row over and starts carefully
    shop.rows("UPDATE outbox SET crashes = 1 WHERE id = (SELECT min(id) FROM outbox)")


@pytest.mark.parametrize("guard", ["index", "lock"])
def test_the_worker_settles_whatever_comes(premises: Premises, shop: Shop, guard: str) -> None:
    if guard == "lock":
        shop.rows("DROP INDEX purchases_active_student_course_key")
    write_one_of_everything(shop)
    done = finish("run", "--drain", url=premises.url_of("worker"))
    if guard == "lock":
        assert finish("migrate", "--with", "unique_index", url=premises.url_of("migrator")).code == 0
    assert done.code == 0, done
    assert [record for record in done.records if record.get("event") == "paused"] == []
    assert [row.attempts for row in shop.rows("SELECT attempts FROM outbox")] == [1]
    outcomes = {row.outcome for row in shop.rows("SELECT outcome FROM processed_events")}
    assert outcomes == {"created", "recovered", "already_exists", "duplicate_payment", "suppressed", "revoked"}
    letters = shop.rows("SELECT state FROM dead_letters ORDER BY state")
    assert [letter.state for letter in letters] == ["open", "open", "settled"]
    assert shop.doubled() == 0


def test_an_event_that_the_database_refuses(premises: Premises, shop: Shop) -> None:
    shop.rows("ALTER TABLE purchases ADD CONSTRAINT dear CHECK (amount < 100)")
    try:
        shop.pay_many(5)
        _, event = shop.paid(amount="100.00")
        done = finish("run", "--drain", url=premises.url_of("worker"), max_attempts=1)
        assert done.code == 0, done
        assert shop.letter_of(event).reason == "rejected_by_database"
        assert shop.count("purchases") == 5
    finally:
        shop.rows("ALTER TABLE purchases DROP CONSTRAINT dear")


def test_the_daemon_listens_and_backfills_what_the_operator_left(premises: Premises, shop: Shop) -> None:
    first = shop.payment(ago="1 hour")
    assert expect_fine(premises, "operator", "backfill", "--dry-run")["counts"]["owed"]["count"] == 1
    assert expect_fine(premises, "operator", "backfill")["counts"]["made"]["count"] == 1
    assert len(shop.purchases(first)) == 1
    later = shop.payment(ago="30 minutes")
    shop.rows("UPDATE backfill_runs SET started_at = started_at - interval '1 hour'")
    with start("run", url=premises.url_of("worker"), backfill_every_seconds=1) as worker:
        worker.wait_for("worker_started")
        _, event = shop.paid()
        eventually(lambda: shop.outcome_of(event) == "created", "it settles")
        eventually(lambda: shop.purchases(later), "it backfills")
        worker.end_well()
    assert worker.told("paused") == []


def test_the_reader_looks_at_everything(premises: Premises, shop: Shop) -> None:
    write_one_of_everything(shop)
    letter = shop.rows("SELECT event_id, payment_id FROM dead_letters")[0].event_id
    for command in (
        f"dead-letters show {letter}",
        f"why {shop.payment().id}",
        "status",
        "duplicates list",
        "dead-letters list",
        "backfill --dry-run",
    ):
        expect_fine(premises, "reader", *command.split())
    done = finish("audit", "--json", url=premises.url_of("reader"))
    assert (done.code, done.object["ok"]) == (1, False), "what was paid in there is not given yet"


def test_the_operator_decides(premises: Premises, shop: Shop) -> None:
    again, never = shop.dead_letter(shop.payment()), shop.dead_letter(shop.payment())
    why = ("--actor", "ann", "--reason", "looked at it")
    assert expect_fine(premises, "operator", "dead-letters", "requeue", str(again), *why)["is_done"]
    assert expect_fine(premises, "operator", "dead-letters", "discard", str(never), *why)["is_done"]
    assert shop.event(again) is not None
    assert shop.letter_of(never).state == "discarded"


def test_the_operator_backfills_what_a_letter_and_a_mark_deny(premises: Premises, shop: Shop) -> None:
    """The backfill runs every statement that it can need.

    It also rewrites a mark and closes a dead letter.
    """
    payment = shop.payment(ago="1 hour")
    letter = shop.dead_letter(payment, reason="payment_not_found")
    shop.rows(
        "INSERT INTO processed_events (event_id, event_type, outcome)"
        f" VALUES (CAST(md5('purchase-outbox-worker:{payment.id}') AS uuid), 'PURCHASE_BACKFILLED', 'created')"
    )
    assert expect_fine(premises, "operator", "backfill")["counts"]["recovered"]["count"] == 1
    assert shop.letter_of(letter).state == "settled"


# --- what no role may do

FORBIDDEN = {
    "worker": [
        "UPDATE payments SET status = 'refunded'",
        "INSERT INTO payments DEFAULT VALUES",
        "DELETE FROM payments",
        "SELECT updated_at FROM payments",
        "INSERT INTO outbox (event_id, event_type, payload) VALUES (gen_random_uuid(), 'X', '{}')",
        "UPDATE outbox SET payload = '{}'",
        "DELETE FROM purchases",
        "UPDATE purchases SET amount = 0",
        "UPDATE purchases SET student_id = gen_random_uuid()",
        "DELETE FROM processed_events",
        "DELETE FROM dead_letters",
        "UPDATE dead_letters SET actor = 'somebody', note = 'it was not me'",
        "TRUNCATE outbox",
        "DROP TABLE outbox",
        "ALTER TABLE purchases ADD trick int",
        "ALTER TABLE purchases DISABLE TRIGGER ALL",
        "DROP INDEX purchases_active_student_course_key",
        "CREATE INDEX ON purchases (amount)",
        "CREATE TABLE loot (id int)",
        "CREATE TEMP TABLE loot (id int)",
        "CREATE FUNCTION loot() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE SCHEMA loot",
        "CREATE ROLE loot",
        "GRANT SELECT ON payments TO PUBLIC",
        "SET ROLE {owner}",
        "SET ROLE {operator}",
        "SET SESSION AUTHORIZATION {owner}",
        "COPY outbox TO PROGRAM 'cat'",
        "COPY outbox FROM '/etc/passwd'",
        "SELECT pg_read_file('/etc/passwd')",
        "UPDATE outbox_worker_alembic_version SET version_num = ''",
        "ALTER SYSTEM SET fsync = off",
    ],
    "reader": [
        "UPDATE payments SET status = 'refunded'",
        "INSERT INTO outbox (event_id, event_type, payload) VALUES (gen_random_uuid(), 'X', '{}')",
        "SELECT FROM outbox FOR UPDATE",
        "DELETE FROM workers",
        "CREATE TEMP TABLE loot (id int)",
        "SET ROLE {worker}",
    ],
    "operator": [
        "UPDATE payments SET status = 'refunded'",
        "DELETE FROM outbox",
        "UPDATE outbox SET due_at = now()",
        "UPDATE purchases SET is_active = true",
        "UPDATE dead_letters SET reason = ''",
        "DELETE FROM dead_letters",
        "DELETE FROM backfill_runs",
        "SET ROLE {worker}",
    ],
    "migrator": ["SET ROLE {reader}", "CREATE ROLE loot", "COPY outbox TO PROGRAM 'cat'"],
}


@pytest.mark.parametrize(
    ("role", "statement"), [(role, statement) for role, listed in FORBIDDEN.items() for statement in listed]
)
def test_what_is_forbidden(premises: Premises, role: str, statement: str) -> None:
    names = {name: sql.Identifier(value).as_string() for name, value in premises.names.items()}
    for name, value in names.items():
        statement = statement.replace(f"{{{name}}}", value)
    with (
        psycopg.connect(servers.libpq(premises.url_of(role)), autocommit=True) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(sql.SQL(statement))


def test_their_names_are_looked_up_where_nobody_else_can_put_one(premises: Premises) -> None:
    for role in ("migrator", "worker", "reader", "operator"):
        with psycopg.connect(servers.libpq(premises.url_of(role))) as connection:
            assert connection.execute("SHOW search_path").fetchone() == ("pg_catalog, public, pg_temp",)


def test_what_migrate_makes_is_the_owners(premises: Premises) -> None:
    with premises.shop() as shop:
        owners = shop.rows("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    assert [row.tableowner for row in owners] == [premises.names["owner"]]
