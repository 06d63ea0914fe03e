"""`backfill` as a process: killed and continued, beside others, on a terminal and in scripts."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.support.factories import Shop
from tests.support.processes import eventually, finish, finish_on_terminal, start
from tests.support.sites import ROLE, Site


def owe(shop: Shop, n: int, ago: str = "1 hour") -> None:
    """Write payments whose events were never written."""
    shop.pay_many(n)
    shop.rows("DELETE FROM outbox")
    shop.rows(
        "UPDATE payments p SET created_at = clock_timestamp() - CAST(%s AS interval)"
        " WHERE NOT EXISTS (SELECT FROM purchases WHERE payment_id = p.id)",
        ago,
    )


def slow_down(shop: Shop, seconds: float) -> None:
    """Let every purchase take some time."""
    shop.rows(
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END $$"
    )
    shop.rows("CREATE TRIGGER slowly BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION slowly()")


def hurry_up(shop: Shop) -> None:
    shop.rows("DROP TRIGGER slowly ON purchases")


# --- a backfill that is stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_one_that_is_stopped_is_continued(
    number: int, code: int, both_guards: str, database_url: str, shop: Shop
) -> None:
    owe(shop, 1200)
    slow_down(shop, 0.002)
    with start("backfill", "--max-repairs", "1200", url=database_url) as process:
        eventually(lambda: shop.count("purchases") >= 500, "a first transaction")
        process.signal(number)
        assert process.wait() == code, process.stderr
    made = shop.count("purchases")
    assert 500 <= made < 1200
    assert shop.count("processed_events") == made
    hurry_up(shop)
    done = finish("backfill", "--json", "--max-repairs", "1200", url=database_url)
    found = done.object
    assert (done.code, found["ok"], found["continued"] is not None) == (0, True, True)
    assert (found["counts"]["made"]["count"], found["counts"]["looked_at"]) == (1200, 1200)
    assert len(found["owed"]) == 1200 - made
    assert (shop.count("purchases"), shop.doubled(), shop.owed()) == (1200, 0, 0)
    assert "Nothing was owed." in finish("backfill", url=database_url).stdout
    assert both_guards


def test_two_backfills_and_two_workers_at_once(both_guards: str, database_url: str, shop: Shop) -> None:
    """Every payment gets one purchase, from whichever process.

    The events of half of the payments come late.
    """
    owe(shop, 2000)
    shop.rows(
        "INSERT INTO outbox (event_id, event_type, payload, due_at)"
        " SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', jsonb_build_object('payment_id', id),"
        " clock_timestamp() + interval '1 hour' FROM payments LIMIT 1000"
    )
    shop.rows("CREATE TABLE late AS SELECT * FROM outbox")
    shop.rows("DELETE FROM outbox")
    slow_down(shop, 0.001)
    with ExitStack() as stack:
        workers = [stack.enter_context(start("run", url=database_url, batch_size=50)) for _ in range(2)]
        for worker in workers:
            worker.wait_for("worker_started")
        with ThreadPoolExecutor(2) as pool:
            command = ("backfill", "--max-repairs", "2000", "--json")
            backfills = [pool.submit(finish, *command, url=database_url) for _ in range(2)]
            eventually(lambda: shop.count("purchases") > 0, "a first transaction")
            shop.rows(
                "INSERT INTO outbox (event_id, event_type, payload) SELECT event_id, event_type, payload FROM late"
            )
            done = [each.result() for each in backfills]
        eventually(lambda: shop.count("outbox") == 0, "all events are settled")
        for worker in workers:
            worker.signal()
            assert worker.wait() == 0, worker.stderr
    assert [each.code for each in done] == [0, 0], [each.stderr for each in done]
    assert (shop.count("purchases"), shop.doubled(), shop.owed(), shop.count("dead_letters")) == (2000, 0, 0, 0)
    made = sum(each.object["counts"]["made"]["count"] for each in done)
    marks = dict(shop.rows("SELECT event_type, count(*) FROM processed_events GROUP BY 1"))
    assert marks == {"PURCHASE_BACKFILLED": made, "PURCHASE_CONFIRMED": 1000}
    assert made >= 1000
    assert finish("audit", url=database_url).code == 0
    assert both_guards


def test_a_lost_connection_ends_it_with_a_sentence(database_url: str, shop: Shop) -> None:
    owe(shop, 1200)
    slow_down(shop, 0.002)
    with start("backfill", "--max-repairs", "1200", url=database_url) as process:
        eventually(lambda: shop.count("purchases") >= 500, "a first transaction")
        shop.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'outbox-worker'"
        )
        assert process.wait() == 69
    assert "Traceback" not in process.stderr
    hurry_up(shop)
    assert finish("backfill", "--json", "--max-repairs", "1200", url=database_url).object["continued"]
    assert shop.count("purchases") == 1200


# --- what people see and what scripts read


def test_the_fuse_leaves_one_that_was_killed_to_be_continued(database_url: str, shop: Shop) -> None:
    """The record keeps who made what. The next backfill continues it."""
    owe(shop, 1200)
    slow_down(shop, 0.002)
    with start("backfill", "--max-repairs", "1200", "--actor", "ada", url=database_url) as process:
        eventually(lambda: shop.count("purchases") >= 500, "a first transaction")
        process.signal(signal.SIGKILL)
        process.wait()
    made = shop.count("purchases")
    hurry_up(shop)
    refused = finish("backfill", "--max-repairs", "5", "--actor", "cyd", "--json", url=database_url)
    assert (refused.code, refused.object["ok"]) == (1, False)
    assert "Nothing was made now" in refused.object["error"]
    assert shop.count("purchases") == made
    done = finish("backfill", "--max-repairs", "1200", "--actor", "bob", "--json", url=database_url).object
    assert (done["continued"]["actor"], done["counts"]["made"]["count"]) == ("ada, cyd", 1200)
    assert shop.rows("SELECT actor, outcome FROM backfill_runs") == [("ada, cyd, bob", "made")]


@pytest.mark.parametrize(
    "options",
    [
        "--older-than 5x",
        "--older-than -5m",
        "--since yesterday",
        "--until 2026-13-01",
        "--since 2026-02-01 --until 2026-01-01",
    ],
)
def test_a_wrong_option_is_one_sentence(options: str, database_url: str) -> None:
    done = finish("backfill", *options.split(), url=database_url)
    assert done.code == 2
    assert "Traceback" not in done.stderr
    done = finish("run", "--backfill-every", "soon", url=database_url)
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert "--backfill-every" in done.stderr


def test_moments_and_durations(database_url: str, shop: Shop) -> None:
    """A time without a zone is UTC, whatever zone the session has."""
    shop.rows("UPDATE payments SET created_at = '2026-01-31T11:30:00Z' WHERE id = %s", shop.payment().id)
    shop.rows(f"ALTER DATABASE {shop.scalar('SELECT quote_ident(current_database())')} SET timezone = 'Asia/Tokyo'")

    def count(*options: str) -> Any:
        found = finish("backfill", "--dry-run", "--json", *options, url=database_url)
        return found.object["counts"]["owed"]["count"]

    assert count("--since", "2026-01-31T11:30:00") == 1
    assert count("--since", "2026-01-31T12:30:00.000001+01:00") == 0
    assert count("--until", "2026-01-31T11:30:00Z") == 0
    assert count("--since", "2026-01-31", "--until", "2026-02-01") == 1
    assert count("--older-than", "90s") == 1
    assert count("--older-than", "100000d") == 0


def test_as_an_object(database_url: str, shop: Shop) -> None:
    payment = shop.payment(ago="1 day", amount="12.30")
    second = shop.payment(student=payment.student_id, course=payment.course_id, ago="2 hours", currency="USD")
    done = finish("backfill", "--json", "--actor", "ada", "--reason", "ticket 7", url=database_url)
    found = done.object
    assert (done.code, done.sentences()) == (0, "")
    keys = {"ok", "dry_run", "since", "until", "cutoff", "continued", "counts", "seconds", "payments_per_second"}
    assert found.keys() == keys | {"owed", "duplicates", "withheld", "cannot_be_judged", "contended", "refused"}
    assert found["counts"].keys() == {
        "looked_at",
        *(["unexplained", "owed", "duplicates", "made", "recovered", "explained", "contended", "refused", "withheld"]),
    }
    assert found["counts"]["made"] == {"count": 1, "money": {"EUR": "12.30"}}
    assert found["counts"]["duplicates"] == {"count": 1, "money": {"USD": "49.90"}}
    assert [UUID(each["payment_id"]) for each in found["owed"]] == [payment.id]
    assert [UUID(each["payment_id"]) for each in found["duplicates"]] == [second.id]
    assert shop.rows("SELECT actor, reason FROM backfill_runs") == [("ada", "ticket 7")]


def test_the_fuse_is_one_sentence(database_url: str, shop: Shop) -> None:
    owe(shop, 3)
    done = finish("backfill", "--max-repairs", "2", url=database_url)
    assert (done.code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "3 payments (149.70 EUR)" in done.stderr
    assert "--max-repairs 3" in done.stderr
    dry = finish("backfill", "--max-repairs", "2", "--dry-run", url=database_url)
    assert dry.code == 0
    assert "--max-repairs 3" in dry.stdout
    assert shop.count("purchases") == 0


@pytest.mark.parametrize("payments", [0, 1, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["audit", "backfill --dry-run"])
def test_listings_of_any_length(command: str, payments: int, database_url: str, shop: Shop) -> None:
    """Each listing is shown on a terminal of 80 columns, in a pipe, and as an object."""
    if payments:
        owe(shop, payments)
    shown = finish_on_terminal(*command.split(), url=database_url)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "Traceback" not in shown
    assert "…" not in shown.replace("… and", "")
    ids = [str(row.id) for row in shop.rows("SELECT id FROM payments ORDER BY created_at, id LIMIT 100")]
    assert all(each in shown for each in ids)
    assert ("… and 99,900 more" in shown) is (payments > 100)
    piped = finish(*command.split(), url=database_url).stdout
    assert [line for line in piped.splitlines() if line[:36] in ids] == [
        line for line in piped.splitlines() if re.match("[0-9a-f]{8}-", line)
    ]
    few = finish(*command.split(), "--limit", "0", url=database_url).stdout
    assert not re.search("^[0-9a-f]{8}-[0-9a-f]{4}-", few, re.MULTILINE)
    found = finish(*command.split(), "--json", url=database_url).object
    listed = found["unexplained"] if command == "audit" else found["owed"]
    assert len(listed) == len({each["payment_id"] for each in listed}) == payments


# --- the periodic backfill


def test_workers_take_turns_and_tell(database_url: str, shop: Shop) -> None:
    """Of three workers one looks at a time.

    After a backfill by hand the workers make what is owed later.
    """
    owe(shop, 5)
    with ExitStack() as stack:
        workers = [stack.enter_context(start("run", "--backfill-every", "1s", url=database_url)) for _ in range(3)]
        eventually(lambda: shop.scalar("SELECT count(*) FROM backfill_runs WHERE outcome = 'reported'") >= 3, "looks")
        assert shop.count("purchases") == 0
        overlapping = (
            "SELECT count(*) FROM backfill_runs a JOIN backfill_runs b ON a.id < b.id"
            " AND a.kind = 'periodic' AND b.kind = a.kind"
            " AND a.started_at < b.finished_at AND b.started_at < a.finished_at"
        )
        assert shop.scalar(overlapping) == 0
        told = [each for worker in workers for each in worker.records if each["event"] == "payments_unexplained"]
        assert {each["payments"] for each in told} == {5}
        assert finish("backfill", url=database_url).code == 0
        assert shop.count("purchases") == 5
        for _ in range(3):
            shop.payment(ago="10 minutes")
        eventually(lambda: shop.count("purchases") == 8, "the workers make them")
        for worker in workers:
            worker.signal()
            assert worker.wait() == 0, worker.stderr
    assert shop.scalar(overlapping) == 0
    made = [each for worker in workers for each in worker.records if each["event"] == "purchases_backfilled"]
    assert sum(each["made"] for each in made) == 3
    assert shop.scalar("SELECT count(*) FROM backfill_runs WHERE finished_at IS NULL") == 0


def test_it_may_be_switched_off_and_a_drain_has_none(database_url: str, shop: Shop) -> None:
    shop.pay_many(1)
    with start("run", "--backfill-every", "0", url=database_url) as worker:
        worker.wait_for("worker_started")
        eventually(lambda: shop.count("outbox") == 0, "it works")
        worker.signal()
        assert worker.wait() == 0
    assert finish("run", "--drain", url=database_url, backfill_every_seconds=1).code == 0
    assert shop.count("backfill_runs") == 0


def test_it_outlasts_a_restart_of_the_server(site: Site) -> None:
    with site.connect() as connection:
        Shop(connection).payment(ago="1 hour")
    with start("run", "--backfill-every", "1s", url=site.url(ROLE), database_deadline_seconds=2) as worker:
        worker.wait_for("payments_unexplained")
        site.signal(signal.SIGINT)
        with site.connect() as connection:
            shop = Shop(connection)
            before = shop.count("backfill_runs")
            eventually(lambda: shop.count("backfill_runs") > before + 1, "it looks again", patience=60)
        worker.signal()
        assert worker.wait() == 0, worker.stderr
    assert not [each for each in worker.records if each.get("failure") == "bug"]


# --- a million payments


def fill_shop(shop: Shop, payments: int, owed: int) -> set[UUID]:
    """Write payments of one year. ``owed`` of them have no purchase, for six reasons."""
    shop.rows(
        "INSERT INTO payments (student_id, course_id, amount, currency, status, created_at)"
        " SELECT gen_random_uuid(), gen_random_uuid(), 49.90, 'EUR', 'succeeded',"
        " clock_timestamp() - interval '1 hour' - random() * interval '365 days' FROM generate_series(1, %s)",
        payments,
    )
    shop.rows(
        "CREATE TABLE lost AS SELECT id, row_number() OVER () %% 6 AS why FROM payments ORDER BY random() LIMIT %s",
        owed,
    )
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT student_id, course_id, id, amount, currency FROM payments"
        " WHERE id NOT IN (SELECT id FROM lost)"
    )
    mark = (
        "INSERT INTO processed_events (event_id, event_type, outcome, payment_id)"
        " SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', %s, id FROM lost WHERE why = %s"
    )
    shop.rows(mark, "created", 1)
    shop.rows(mark, "duplicate_payment", 2)
    shop.rows(
        "INSERT INTO dead_letters (event_id, event_type, payload, created_at, payment_id, attempts, reason, detail)"
        " SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', '{}', clock_timestamp(), id, 10, 'payment_not_found', ''"
        " FROM lost WHERE why = 3"
    )
    shop.rows(
        "INSERT INTO outbox (event_id, event_type, payload)"
        " SELECT gen_random_uuid(), 'RECEIPT_SENT', jsonb_build_object('payment_id', id) FROM lost WHERE why = 4"
    )
    shop.rows(
        "INSERT INTO processed_events (event_id, event_type, outcome, payment_id) SELECT"
        " CAST(md5('purchase-outbox-worker:' || CAST(id AS text)) AS uuid), 'PURCHASE_BACKFILLED', 'created', id"
        " FROM lost WHERE why = 5"
    )
    shop.rows("ANALYZE")
    for table in ("payments", "purchases"):
        shop.rows(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    return {row.id for row in shop.rows("SELECT id FROM lost")}


def has_made_some(shop: Shop, payments: int) -> bool:
    return shop.count("purchases") > payments - 1000


def pages_touched(shop: Shop) -> int:
    """Count the pages read in this database so far. A session reports its numbers when it ends."""
    eventually(lambda: not shop.sessions(), "sessions end")
    shop.rows("SELECT pg_stat_clear_snapshot()")
    return int(shop.scalar("SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = current_database()"))


@pytest.mark.slow
def test_a_million_payments(make_url: Callable[[str | None], str]) -> None:
    """A backfill makes exactly the thousand purchases that are owed for six reasons.

    It is killed and continued. The work grows in proportion to the payments.
    """
    touched: dict[int, int] = {}
    for payments in (100_000, 1_000_000):
        url = make_url("index")
        connection = psycopg.connect(re.sub(r"\+psycopg", "", url), autocommit=True)
        shop = Shop(connection)
        lost = fill_shop(shop, payments, 1000)
        before = pages_touched(shop)
        dry = finish("backfill", "--dry-run", "--json", url=url, patience=600).object
        touched[payments] = pages_touched(shop) - before
        assert {UUID(each["payment_id"]) for each in dry["owed"]} == lost
        slow_down(shop, 0.001)
        with start("backfill", url=url) as process:
            eventually(partial(has_made_some, shop, payments), "a transaction", patience=600)
            process.kill()
        hurry_up(shop)
        assert 0 < shop.owed() < 1000
        done = finish("backfill", "--json", url=url, patience=600)
        assert done.object["continued"]
        assert done.object["counts"]["made"]["count"] == 1000
        assert done.object["counts"]["recovered"]["count"] == shop.scalar("SELECT count(*) FROM lost WHERE why = 5")
        assert (shop.count("purchases"), shop.doubled(), shop.owed()) == (payments, 0, 0)
        again = finish("backfill", "--json", url=url, patience=600).object
        assert (again["counts"]["owed"]["count"], again["counts"]["looked_at"]) == (0, payments)
        connection.close()
        rate = f"{dry['seconds']:.1f} s, {dry['payments_per_second']:,.0f}/s"
        print(f"\n{payments:,} payments: {rate}, {touched[payments]:,} pages of the database touched")  # noqa: T201
    assert touched[1_000_000] < 15 * touched[100_000], "an index of a million is a level deeper; no more"
