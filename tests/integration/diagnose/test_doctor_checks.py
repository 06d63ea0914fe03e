"""Each check of the doctor on a real database where it passes, and on one where it fails."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import psycopg
import pytest

from outbox_worker.database.engine import Database
from outbox_worker.diagnose.doctor import report as doctor
from outbox_worker.diagnose.doctor import server as server_checks
from outbox_worker.diagnose.doctor.finding import Finding, Severity, Subject, ok
from outbox_worker.diagnose.doctor.report import CHECKS
from outbox_worker.model import COLUMNS
from outbox_worker.reconcile.backfill import Backfill, Request
from outbox_worker.schema.migrate import upgrade
from outbox_worker.schema.tables import OWNERSHIP_LIST, Tables, build_tables
from outbox_worker.settings import Settings, load_settings
from tests.support import servers
from tests.support.factories import Clerk, Shop
from tests.support.makers import Connect, MakeDatabase
from tests.support.processes import eventually

A_PURCHASE = (
    "INSERT INTO purchases (student_id, course_id, amount, currency) SELECT a, a, 1, 'EUR' FROM gen_random_uuid() AS a"
)


class Look(Protocol):
    def __call__(self, name: str, database: Database | None = None, **options: Any) -> list[Finding]: ...


@pytest.fixture
def look(database: Database, settings: Settings) -> Look:
    """Run one check. ``with_settings`` holds the settings that differ."""
    usual = database

    def carry_out(
        name: str, database: Database | None = None, with_settings: dict[str, Any] | None = None, **options: Any
    ) -> list[Finding]:
        changed = settings.model_copy(update=with_settings or {})
        with (database or usual).snapshot() as session:
            subject = Subject(session, changed, build_tables(changed), database or usual)
            check: Any = CHECKS[name].look
            return list(check(subject, **options))

    return carry_out


def only(found: list[Finding], verdict: Severity, said: str = "") -> Finding:
    """Return the only finding, after a check of its verdict, evidence and remedy."""
    assert len(found) == 1, found
    assert found[0].verdict is verdict, found
    assert said in found[0].evidence, found
    assert bool(found[0].remedy) == (verdict is not Severity.OK), found
    return found[0]


def remedies(found: list[Finding]) -> list[str]:
    """Return the statements of the remedies."""
    return [each for one in found for each in re.findall(r"(?:GRANT|CREATE|ALTER|REINDEX) [^;]+;", one.remedy)]


def test_one_check_that_fails_hides_no_other(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the checks runs a query that makes the database end the connection."""

    def asking(query: str) -> doctor.Check:
        def ask(subject: Subject) -> Iterator[Finding]:
            subject.session.connection().exec_driver_sql(query)
            yield ok("answered")

        return doctor.Check(ask)

    queries = {
        "forbidden": "SET ROLE nobody_of_this_name",
        "deadly": "SELECT pg_terminate_backend(pg_backend_pid())",
        "writing": "INSERT INTO outbox (event_id, event_type, payload) VALUES (gen_random_uuid(), 'x', '{}')",
        "fine": "SELECT 1",
    }
    monkeypatch.setattr(doctor, "CHECKS", {name: asking(query) for name, query in queries.items()})
    found = {each.name: each for each in doctor.examine(settings).checks}
    assert [each.verdict for each in found.values()] == [*[Severity.UNSEEN] * 3, Severity.OK]
    assert "read-only" in found["writing"].evidence


# --- tables, guard, indexes


@pytest.mark.parametrize(
    ("tried", "verdict"), [(range(90, 95), Severity.PROBLEM), (range(9, 11), Severity.WARNING), (None, Severity.OK)]
)
def test_a_server_of_another_age(
    look: Look, monkeypatch: pytest.MonkeyPatch, tried: range | None, verdict: Severity
) -> None:
    if tried is not None:
        monkeypatch.setattr(server_checks, "_TRIED", tried)
    only(look("server"), verdict, "PostgreSQL 1")


def test_tables_that_lack_something(look: Look, shop: Shop) -> None:
    only(look("tables"), Severity.OK, "adopted: none")
    shop.rows(f"COMMENT ON TABLE payments IS NULL; DELETE FROM {OWNERSHIP_LIST} WHERE table_name = 'payments'")
    only(look("tables"), Severity.OK, "adopted: public.payments")
    shop.rows("DROP TABLE workers")
    shop.rows("ALTER TABLE outbox DROP COLUMN crashes")
    shop.rows("ALTER TABLE processed_events DROP CONSTRAINT processed_events_pkey")
    found = look("tables")
    assert [each.verdict for each in found] == [Severity.PROBLEM] * 3, "the first one hides no other"
    assert all(each.remedy for each in found)


def test_the_index_is_in_force(look: Look) -> None:
    only(look("guard"), Severity.OK, "purchases_active_student_course_key")


@pytest.mark.parametrize("guard_kind", ["lock"], indirect=True)
def test_the_lock_is_in_force_and_what_stands_in_the_way_of_the_index(look: Look, shop: Shop) -> None:
    payments = [shop.payment() for _ in range(7)]
    for payment in payments:
        shop.purchase(payment)
        shop.purchase(None, *payment.pair, active=False)
    blind = only(look("guard"), Severity.WARNING, "can create duplicates")
    assert blind.remedy == "outbox-worker migrate --with unique_index"
    for payment in payments:
        shop.purchase(None, *payment.pair)
    doubled = only(look("guard"), Severity.PROBLEM, "and more")
    named = [
        payment
        for payment in payments
        if f"student {payment.student_id}, course {payment.course_id}: 2" in doubled.evidence
    ]
    assert len(named) == 5
    assert "migrate --with unique_index" in doubled.remedy


@pytest.mark.parametrize("guard_kind", ["lock"], indirect=True)
def test_an_index_that_failed_to_be_built(look: Look, shop: Shop, connect: Connect) -> None:
    only(look("invalid_indexes"), Severity.OK)
    payment = shop.payment()
    shop.purchase(None, *payment.pair)
    shop.purchase(payment)
    with pytest.raises(psycopg.errors.UniqueViolation):
        shop.rows(
            "CREATE UNIQUE INDEX CONCURRENTLY purchases_active_student_course_key"
            " ON purchases (student_id, course_id) WHERE is_active"
        )
    found = only(look("invalid_indexes"), Severity.PROBLEM, "purchases_active_student_course_key is INVALID")
    assert found.remedy == "outbox-worker migrate --with unique_index"
    shop.rows("DROP INDEX purchases_active_student_course_key")
    other = connect()
    other.execute(A_PURCHASE)
    shop.rows("SET lock_timeout = '50ms'")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        shop.rows("CREATE INDEX CONCURRENTLY slow_idx ON purchases (amount)")
    other.rollback()
    found = only(look("invalid_indexes"), Severity.WARNING, "slow_idx is INVALID")
    for statement in remedies([found]):
        shop.rows(statement)
    only(look("invalid_indexes"), Severity.OK)


def test_an_index_that_is_being_built_is_no_failure(look: Look, connect: Connect, pool: ThreadPoolExecutor) -> None:
    holder, builder = connect(), connect(autocommit=True)
    holder.execute(A_PURCHASE)
    building = pool.submit(builder.execute, "CREATE INDEX CONCURRENTLY slow_idx ON purchases (amount)")
    try:
        eventually(lambda: look("invalid_indexes")[0].evidence != "no index is invalid", "it is begun")
        only(look("invalid_indexes"), Severity.OK, "slow_idx is being built")
    finally:
        holder.rollback()
        building.result()
    only(look("invalid_indexes"), Severity.OK, "no index is invalid")


def test_indexes_that_would_help(look: Look, shop: Shop) -> None:
    only(look("indexes"), Severity.OK)
    shop.rows("DROP INDEX outbox_due_idx")
    found = only(look("indexes"), Severity.WARNING, "each claim")
    assert found.remedy == "CREATE INDEX CONCURRENTLY ON public.outbox (due_at, id);"
    shop.rows("CREATE INDEX partial_idx ON outbox (due_at, id) WHERE id > 5")
    only(look("indexes"), Severity.WARNING, "each claim")
    shop.rows("CREATE INDEX broken_idx ON outbox (due_at, id)")
    shop.rows("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'broken_idx'::regclass")
    only(look("indexes"), Severity.WARNING, "each claim")
    shop.rows(found.remedy)
    only(look("indexes"), Severity.OK)
    shop.rows("ALTER TABLE payments DROP CONSTRAINT payments_pkey")
    shop.rows("DROP INDEX purchases_active_student_course_key, dead_letters_payment_idx")
    shop.pay_many(10)
    shop.dead_letter(shop.payment())
    shop.purchase(shop.payment())
    only(look("indexes"), Severity.OK)  # small tables are read at once
    listed = look("indexes", small_bytes=0)
    said = {re.search(r"ON public\.(\w+ \(.*\));", each.remedy)[1] for each in listed}  # type: ignore[index]
    assert said == {
        "payments (id)",
        "payments (student_id, course_id)",
        "payments (created_at, id)",
        "purchases (student_id, course_id)",
        "dead_letters (payment_id)",
    }
    for statement in remedies(listed):
        shop.rows(statement)
    only(look("indexes", small_bytes=0), Severity.OK)


def test_the_remedy_for_columns_of_other_names(look: Look, shop: Shop) -> None:
    shop.rows('ALTER TABLE outbox RENAME COLUMN due_at TO "Due At"')
    shop.rows("DROP INDEX outbox_due_idx")
    named = {"columns": {"outbox.due_at": "Due At"}}
    found = only(look("indexes", with_settings=named), Severity.WARNING)
    shop.rows(found.remedy)
    only(look("indexes", with_settings=named), Severity.OK)


# --- notify, backfill


def test_who_hears_of_events(look: Look, make_url: Callable[[str | None], str]) -> None:
    only(look("notify"), Severity.OK, "not in force")
    settings = load_settings(database_url=make_url("index"))
    told = Database(settings, connections=2, deadline_seconds=10)
    upgrade(told, settings, build_tables(settings), ["notify"])
    url = {"database_url": settings.database_url}
    only(look("notify", told, with_settings=url), Severity.OK, "are notified")
    pooled = url | {"pooler": "transaction"}
    only(look("notify", told, with_settings=pooled), Severity.WARNING, "does not pass them")
    past = pooled | {"listen_database_url": settings.database_url}
    only(look("notify", told, with_settings=past), Severity.OK, "are notified")
    elsewhere = load_settings(listen_database_url=make_url(None)).listen_database_url
    only(look("notify", told, with_settings=pooled | {"listen_database_url": elsewhere}), Severity.WARNING, "another")
    gone = load_settings(listen_database_url="postgresql://127.0.0.1:1/x").listen_database_url
    only(
        look("notify", told, with_settings=pooled | {"listen_database_url": gone}),
        Severity.WARNING,
        "cannot open a connection",
    )
    told.close()


def test_a_backfill_by_hand(look: Look, database: Database, tables: Tables, settings: Settings) -> None:
    found = only(look("backfill"), Severity.WARNING, "no backfill was completed")
    assert "backfill --dry-run" in found.remedy
    only(look("backfill", with_settings={"backfill_every_seconds": 0}), Severity.OK, "switched off")
    work = Backfill.start(database, tables, settings.retry_policy, Request(actor="ann"))
    work.look(lambda *_: True)
    work.make(lambda *_: True)
    only(look("backfill"), Severity.OK, "an operator has completed")


# --- what the role may do


@pytest.fixture
def guest(shop: Shop, database_url: str) -> Iterator[Clerk]:
    """Make a role without any privilege."""
    made = Clerk(shop, database_url)
    for table in made.TABLES:
        made.revoke("ALL", table)
    yield made
    made.close()


def grant_what_lacks(look: Look, shop: Shop, guest: Clerk) -> None:
    found = [each for each in look("grants", guest.database) if each.verdict is Severity.PROBLEM]
    assert len(found) == len(COLUMNS)
    for statement in remedies(found):
        shop.rows(statement)
    (found_last,) = [each for each in look("grants", guest.database) if OWNERSHIP_LIST in each.evidence]
    assert found_last.verdict is Severity.WARNING
    assert "run deploy/grants.sql again" in found_last.remedy
    shop.rows(found_last.remedy.partition("as its owner: ")[2])


def test_what_lacks_and_what_is_too_much(look: Look, shop: Shop, guest: Clerk) -> None:
    grant_what_lacks(look, shop, guest)
    only(look("grants", guest.database), Severity.WARNING, "TEMPORARY on the database")
    database = shop.scalar("SELECT quote_ident(current_database())")
    shop.rows(f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC")
    only(look("grants", guest.database), Severity.OK, guest.role)
    excess = {
        "GRANT UPDATE ON purchases TO {}": "UPDATE on all of public.purchases",
        "GRANT INSERT, DELETE ON payments TO {}": "INSERT, DELETE on all of public.payments",
        "GRANT TRUNCATE ON outbox TO {}": "TRUNCATE on all of public.outbox",
        "GRANT CREATE ON SCHEMA public TO {}": "CREATE on the schema public",
        f"GRANT CREATE ON DATABASE {database} TO {{}}": "CREATE on the database",
        "ALTER ROLE {} CREATEROLE": "CREATEROLE",
        "ALTER TABLE workers OWNER TO {}": "it owns public.workers",
    }
    for statement in excess:
        shop.rows(statement.format(guest.role))
    found = only(look("grants", guest.database), Severity.WARNING)
    assert all(said in found.evidence for said in excess.values()), found
    assert "grants.sql" in found.remedy
    shop.rows("ALTER TABLE workers OWNER TO CURRENT_USER")


def test_a_superuser(look: Look) -> None:
    only(look("grants"), Severity.WARNING, "it is a superuser")


def test_a_grant_on_some_columns_is_not_enough(look: Look, shop: Shop, guest: Clerk) -> None:
    grant_what_lacks(look, shop, guest)
    shop.rows(f"REVOKE UPDATE (attempts) ON outbox FROM {guest.role}")
    found = next(each for each in look("grants", guest.database) if each.verdict is Severity.PROBLEM)
    assert found.evidence == "no UPDATE on public.outbox"
    assert "UPDATE (due_at, attempts, crashes, last_error)" in found.remedy


def test_rows_that_are_seen_and_never_claimed(look: Look, shop: Shop, guest: Clerk) -> None:
    grant_what_lacks(look, shop, guest)
    only(look("row_security", guest.database), Severity.OK)
    shop.rows("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")
    only(look("row_security", guest.database), Severity.PROBLEM, "SELECT, UPDATE, DELETE")
    shop.rows("CREATE POLICY seen ON outbox FOR SELECT USING (true)")
    shop.paid()
    with guest.database.transaction() as session:
        raw = session.connection().exec_driver_sql
        assert raw("SELECT count(*) FROM outbox").scalar() == 1
        assert raw("SELECT id FROM outbox FOR UPDATE SKIP LOCKED").all() == [], "this is the trap"
    found = only(look("row_security", guest.database), Severity.PROBLEM, "no policy for UPDATE, DELETE")
    for statement in remedies([found]):
        shop.rows(statement)
    only(look("row_security", guest.database), Severity.OK, "allows all rows")
    shop.rows("CREATE POLICY narrow ON outbox AS RESTRICTIVE USING (id < 5)")
    only(look("row_security", guest.database), Severity.WARNING, "narrow")
    shop.rows("DROP POLICY narrow ON outbox")
    shop.rows("CREATE POLICY wider ON outbox USING (id < 5)")
    only(look("row_security", guest.database), Severity.OK)  # permissive policies add up
    shop.rows("DROP POLICY outbox_worker ON outbox")
    only(look("row_security", guest.database), Severity.WARNING, "seen, wider")
    only(look("row_security"), Severity.OK, "no row security applies")  # a superuser passes all policies


# --- the server


def test_poolers_that_are_not_there(look: Look) -> None:
    only(look("pooler"), Severity.OK, "no pooler")
    only(look("pooler", with_settings={"pooler": "transaction"}), Severity.WARNING, "no statements are prepared")


def test_room_for_connections(look: Look, shop: Shop, clerk: Clerk) -> None:
    clerk.grant("SELECT", "backfill_runs")
    found = only(look("connections", clerk.database), Severity.OK, "1 worker x")
    assert "(1 for claims + 1 for chores + 1 for backfills + 0 to listen) = 3" in found.evidence
    clerk.shop_rows("ALTER ROLE {role} CONNECTION LIMIT 5")
    only(look("connections", clerk.database), Severity.WARNING, "CONNECTION LIMIT allows 5")
    many = {"concurrency": 4, "backfill_every_seconds": 0}
    only(look("connections", clerk.database, with_settings=many), Severity.WARNING, "= 5")
    found = only(look("connections", clerk.database, with_settings=many | {"concurrency": 5}), Severity.PROBLEM, "= 6")
    assert remedies([found]) == [f"ALTER ROLE {clerk.role} CONNECTION LIMIT -1;"]
    only(look("connections", clerk.database, with_settings={"pooler": "transaction"}), Severity.OK, "pooler")
    for seen in ("0 seconds", "10 seconds", "1 hour"):
        shop.rows(
            "INSERT INTO workers (id, host, pid, version, guard, seen_at)"
            " VALUES (gen_random_uuid(), 'elsewhere', 1, '1', 'index', clock_timestamp() - CAST(%s AS interval))",
            seen,
        )
    only(look("connections", clerk.database), Severity.PROBLEM, "2 workers x")


def test_others_take_room(look: Look, connect: Connect, make_url: Callable[[str | None], str]) -> None:
    """Sessions of other databases count, too."""
    held = [connect() for _ in range(10)]
    held += [psycopg.connect(servers.libpq(elsewhere)) for elsewhere in [make_url(None)] * 10]
    others = re.search(r"- (\d+) of others", look("connections")[0].evidence)
    for connection in held:
        connection.close()
    assert others is not None
    assert int(others[1]) >= 20


@pytest.mark.parametrize(
    ("parameter", "value", "verdict"),
    [
        ("idle_session_timeout", "30s", Severity.WARNING),
        ("idle_session_timeout", "1h", Severity.OK),
        ("transaction_timeout", "9s", Severity.PROBLEM),
        ("transaction_timeout", "1h", Severity.WARNING),
        ("statement_timeout", "5s", Severity.OK),
        ("lock_timeout", "1s", Severity.OK),
    ],
)
def test_time_outs(
    look: Look, shop: Shop, make_database: MakeDatabase, parameter: str, value: str, verdict: Severity
) -> None:
    if parameter == "transaction_timeout" and shop.connection.info.server_version < 170_000:
        pytest.skip("this PostgreSQL knows no transaction_timeout")
    only(look("time_outs"), Severity.OK)
    database = shop.scalar("SELECT quote_ident(current_database())")
    shop.rows(f"ALTER DATABASE {database} SET {parameter} = '{value}'")
    found = only(look("time_outs", make_database()), verdict)
    for statement in remedies([found]):
        assert parameter in statement


def test_clocks(look: Look) -> None:
    only(look("clock"), Severity.OK)
    only(look("clock", now=lambda: time.time() + 3600), Severity.WARNING, "3600.")
    only(look("clock", now=lambda: time.time() - 3600), Severity.WARNING, "behind")
    begin, steps = time.time(), itertools.count()
    only(look("clock", now=lambda: begin + 60 * next(steps)), Severity.OK, "± 30")  # the question took a minute


# --- vacuum


def test_autovacuum_of_the_outbox(look: Look, shop: Shop, connect: Connect) -> None:
    only(look("autovacuum"), Severity.OK)
    shop.rows("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    found = only(look("autovacuum"), Severity.PROBLEM, "off for public.outbox")
    shop.rows(found.remedy)
    only(look("autovacuum"), Severity.OK)
    other = connect()
    other.execute("LOCK TABLE outbox IN SHARE UPDATE EXCLUSIVE MODE")  # autovacuum skips locked tables
    shop.pay_many(2000)
    shop.rows("DELETE FROM outbox")
    shop.rows("SELECT pg_stat_force_next_flush()")
    eventually(lambda: "2,000 dead rows" in look("autovacuum")[0].evidence, "they are counted")
    only(look("autovacuum"), Severity.WARNING, "far behind")
    other.rollback()
    shop.rows("ALTER TABLE outbox SET (autovacuum_vacuum_threshold = 1000)")
    only(look("autovacuum"), Severity.OK, "2,000 dead rows")


def test_who_holds_back_the_vacuum(look: Look, shop: Shop, connect: Connect) -> None:
    only(look("horizon", seconds=0), Severity.OK)
    harmless = connect(application_name="harmless")
    harmless.execute("SELECT 1")
    only(look("horizon", seconds=0), Severity.OK)  # idle in a transaction without a snapshot
    reader = connect(application_name="report")
    reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    reader.execute("SELECT 1")
    found = only(look("horizon", seconds=0), Severity.WARNING, f"process {reader.info.backend_pid} (")
    assert "report" in found.evidence
    assert "idle in transaction" in found.evidence
    only(look("horizon"), Severity.OK)  # not for long yet
    statement = re.search(r"SELECT pg_terminate_backend\(\d+\)", found.remedy)
    assert statement is not None
    shop.rows(statement[0])
    eventually(lambda: look("horizon", seconds=0)[0].verdict is Severity.OK, "nobody holds it back any more")
    writer = connect()
    writer.execute("INSERT INTO outbox (event_id, event_type, payload) VALUES (gen_random_uuid(), 'x', '{}')")
    only(look("horizon", seconds=0), Severity.WARNING, f"process {writer.info.backend_pid} (")


def test_what_a_role_may_not_see_is_told(look: Look, shop: Shop, clerk: Clerk, connect: Connect) -> None:
    other = connect()
    other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    other.execute("SELECT 1")
    shop.rows("SELECT pg_current_xact_id()")
    by_age = look("horizon", clerk.database, seconds=0, transaction_ids=0)
    assert [each.verdict for each in by_age] == [Severity.WARNING, Severity.UNSEEN], "its age is seen by all"
    assert f"process {other.info.backend_pid} (" in by_age[0].evidence
    assert "transactions ago" in by_age[0].evidence
    found = only(look("horizon", clerk.database, seconds=0), Severity.UNSEEN, "of other roles")
    for statement in remedies([found]):
        shop.rows(statement)
    only(look("horizon", clerk.database, seconds=0), Severity.WARNING, f"process {other.info.backend_pid} (")
