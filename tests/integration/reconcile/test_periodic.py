"""The daemon's periodic backfill: one worker at a time, never more purchases than the fuse.

It only reports until a person has run a backfill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from loguru import logger

from outbox_worker.database.engine import Database
from outbox_worker.model import PaymentTotals
from outbox_worker.reconcile import periodic, scan
from outbox_worker.reconcile.backfill import Backfill, Request
from outbox_worker.reconcile.periodic import PeriodicBackfill
from outbox_worker.reconcile.scan import PaymentScan, ScanLimits
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.store import backfill_runs as runs
from outbox_worker.store.backfill_runs import BackfillRuns
from outbox_worker.store.guard import GuardWatch
from outbox_worker.telemetry.reporter import Telemetry
from tests.support.factories import Shop

MakeWorker = Callable[..., PeriodicBackfill]
AGO = "1 hour"


@pytest.fixture
def make_worker(settings: Settings, tables: Tables) -> Iterator[MakeWorker]:
    """Make the periodic backfills of some workers. None of them runs by itself."""
    made: list[PeriodicBackfill] = []

    def make(every: float = 900, stop: threading.Event | None = None) -> PeriodicBackfill:
        telemetry = Telemetry()
        chosen = settings.model_copy(update={"backfill_every_seconds": every})
        watch = GuardWatch(tables.purchases, telemetry.guard_changed)
        made.append(PeriodicBackfill(chosen, tables, watch, stop or threading.Event(), telemetry, telemetry.trouble))
        return made[-1]

    yield make
    for worker in made:
        worker._database.close()


@pytest.fixture
def records() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    handle = logger.add(lambda line: found.append(dict(line.record["extra"]) | {"level": line.record["level"].name}))
    yield found
    logger.remove(handle)


def told(records: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] == event]


def backfill_by_hand(database: Database, tables: Tables, settings: Settings, **asked: Any) -> None:
    work = Backfill.start(database, tables, settings.retry_policy, Request(actor="somebody", **asked))
    work.look(lambda *_: True)
    work.make(lambda *_: True)


def pass_time(shop: Shop, interval: str) -> None:
    """Make all backfills so far older by this interval."""
    shop.rows(
        "UPDATE backfill_runs SET started_at = started_at - %(i)s::interval, cutoff = cutoff - %(i)s::interval,"
        " finished_at = finished_at - %(i)s::interval, seen_at = seen_at - %(i)s::interval",
        {"i": interval},
    )


def gauge(database: Database, tables: Tables) -> dict[str, Any]:
    with database.transaction() as session:
        return PaymentTotals.read(BackfillRuns(tables).latest_counts(session).get("left")).written()


def took_half_a_second(self: PaymentScan, *given: Any) -> Any:
    rows = execute(self, *given)
    self._seconds = 0.5
    return rows


execute = PaymentScan._execute


@pytest.mark.usefixtures("both_guards")
def test_it_only_tells_until_a_person_has_backfilled(
    make_worker: MakeWorker,
    database: Database,
    tables: Tables,
    settings: Settings,
    shop: Shop,
    records: list[dict[str, Any]],
) -> None:
    """The first start on adopted tables must not grant years of history.

    Neither a dry run nor a refused backfill changes that.
    """
    for currency in ("EUR", "EUR", "USD"):
        shop.payment(ago=AGO, currency=currency)
    worker = make_worker()
    assert worker.run_once()
    assert shop.count("purchases") == 0
    (warning,) = told(records, "payments_unexplained")
    assert (warning["level"], warning["payments"]) == ("WARNING", 3)
    assert warning["money"] == {"EUR": "99.80", "USD": "49.90"}
    assert gauge(database, tables) == {"count": 3, "money": {"EUR": "99.80", "USD": "49.90"}}
    backfill_by_hand(database, tables, settings, dry_run=True)
    with pytest.raises(Exception, match="--max-repairs"):
        backfill_by_hand(database, tables, settings, max_repairs=1)
    pass_time(shop, "20 minutes")
    assert worker.run_once()
    assert shop.count("purchases") == 0
    backfill_by_hand(database, tables, settings)
    assert gauge(database, tables)["count"] == 0
    assert shop.count("purchases") == 3
    shop.payment(ago="30 minutes")
    pass_time(shop, "20 minutes")
    assert worker.run_once()
    assert shop.count("purchases") == 4
    (made,) = told(records, "purchases_backfilled")
    assert (made["level"], made["made"]) == ("WARNING", 1)
    outcomes = shop.rows("SELECT outcome FROM backfill_runs ORDER BY started_at")
    assert [each.outcome for each in outcomes] == ["reported", "refused", "reported", "made", "made"]
    assert gauge(database, tables)["count"] == 0


def test_more_than_the_fuse_is_told_and_not_made(
    make_worker: MakeWorker,
    database: Database,
    tables: Tables,
    settings: Settings,
    shop: Shop,
    records: list[dict[str, Any]],
) -> None:
    backfill_by_hand(database, tables, settings)
    for _ in range(periodic.FUSE + 1):
        shop.payment(ago="30 minutes")
    worker = make_worker()
    assert worker.run_once()
    assert shop.count("purchases") == 0
    (refused,) = told(records, "backfill_refused")
    assert (refused["level"], refused["payments"], refused["most"]) == ("ERROR", 101, 100)
    assert gauge(database, tables)["count"] == 101
    shop.rows("DELETE FROM payments WHERE id IN (SELECT id FROM payments LIMIT 1)")
    pass_time(shop, "20 minutes")
    shop.rows("UPDATE payments SET created_at = created_at - interval '10 minutes'")
    assert worker.run_once()
    assert shop.count("purchases") == 100


def test_far_more_than_the_fuse_is_counted_not_listed(
    make_worker: MakeWorker,
    database: Database,
    tables: Tables,
    settings: Settings,
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
    records: list[dict[str, Any]],
) -> None:
    """All payments are of one pair.

    A list that was cut would look as if fewer payments were owed.
    """
    monkeypatch.setattr(periodic, "FUSE", 2)
    monkeypatch.setattr(periodic, "_LIMITS", ScanLimits(portion=2))
    monkeypatch.setattr(scan, "PAGE_FIRST", 2)
    backfill_by_hand(database, tables, settings)
    like = shop.payment(ago="30 minutes")
    for _ in range(9):
        shop.payment(student=like.student_id, course=like.course_id, ago="30 minutes")
    assert make_worker().run_once()
    assert told(records, "backfill_refused")[0]["payments"] == 10
    assert shop.count("purchases") == 0


def test_one_worker_at_a_time(make_worker: MakeWorker, shop: Shop) -> None:
    one, other = make_worker(), make_worker()
    assert one.run_once()
    assert not other.run_once(), "the last look began a moment ago"
    pass_time(shop, "20 minutes")
    assert other.run_once()
    pass_time(shop, "20 minutes")
    shop.rows(
        "INSERT INTO backfill_runs (id, kind, cutoff, is_full, host, pid, actor, started_at)"
        " VALUES (gen_random_uuid(), 'periodic', clock_timestamp(), true, 'elsewhere', 1, '-', '2020-01-01')"
    )
    assert not one.run_once(), "somebody looks"
    shop.rows("UPDATE backfill_runs SET seen_at = '2020-01-01' WHERE host = 'elsewhere'")
    assert one.run_once(), "somebody died"
    assert shop.scalar("SELECT outcome FROM backfill_runs WHERE host = 'elsewhere'") in ("interrupted", None)


def test_who_asks_while_another_begins_does_not_wait(
    make_worker: MakeWorker, shop: Shop, connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    other = connect()
    other.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [runs._TURN_KEY])
    assert not make_worker().run_once()
    other.rollback()
    assert make_worker().run_once()
    assert shop.count("backfill_runs") == 1


def test_full_once_a_day_and_from_the_last_full_one_else(
    make_worker: MakeWorker, database: Database, tables: Tables, shop: Shop
) -> None:
    """The gauges keep what the full look found, and do not count it twice."""
    worker = make_worker()
    shop.payment(ago="3 days")
    shop.payment(ago="30 minutes")
    worker.run_once()
    assert gauge(database, tables)["count"] == 2
    pass_time(shop, "20 minutes")
    shop.payment(ago="10 minutes")
    shop.payment(ago="4 minutes")
    worker.run_once()
    last = shop.rows("SELECT is_full, since, cutoff FROM backfill_runs ORDER BY started_at")
    assert [each.is_full for each in last] == [True, False]
    assert last[1].since == last[0].cutoff - timedelta(hours=1)
    assert gauge(database, tables)["count"] == 3
    pass_time(shop, "25 hours")
    worker.run_once()
    assert shop.scalar("SELECT is_full FROM backfill_runs ORDER BY started_at DESC LIMIT 1")
    assert gauge(database, tables)["count"] == 3


def test_it_stops_within_a_page_and_another_begins_anew(make_worker: MakeWorker, shop: Shop) -> None:
    shop.payment(ago=AGO)
    stop = threading.Event()
    stop.set()
    assert make_worker(stop=stop).run_once()
    assert [row.outcome for row in shop.rows("SELECT outcome FROM backfill_runs")] == ["interrupted"]
    assert make_worker().run_once()


def test_what_fails_is_told_and_tried_again(
    make_worker: MakeWorker, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    with monkeypatch.context() as broken:
        broken.setattr(worker, "_conclude", lambda *_: shop.rows("SELECT 1 / 0"))
        with pytest.raises(psycopg.errors.DivisionByZero):
            worker.run_once()
    assert shop.scalar("SELECT outcome FROM backfill_runs") == "interrupted"
    assert worker.run_once()


def test_it_works_a_tenth_of_the_time(make_worker: MakeWorker, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a statement of half a second the backfill rests for 4.5 seconds.

    The rest ends if the process stops.
    """
    stop, waited = threading.Event(), list[float]()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        stop.set()

    monkeypatch.setattr(stop, "wait", wait)
    monkeypatch.setattr(PaymentScan, "_execute", took_half_a_second)
    shop.payment(ago=AGO)
    assert make_worker(stop=stop).run_once()
    (rest,) = waited
    assert 4 < rest <= 4.5
    assert shop.scalar("SELECT outcome FROM backfill_runs") == "interrupted"


def test_old_looks_are_forgotten(
    make_worker: MakeWorker, database: Database, tables: Tables, settings: Settings, shop: Shop
) -> None:
    backfill_by_hand(database, tables, settings)
    make_worker().run_once()
    pass_time(shop, "8 days")
    make_worker().run_once()
    kinds = shop.rows("SELECT kind FROM backfill_runs ORDER BY started_at")
    assert [each.kind for each in kinds] == ["operator", "periodic"]
