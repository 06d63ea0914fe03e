"""A backfill beside other writers: rows that change after its look, refusals, and the daemon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from uuid import uuid4

import pytest
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database
from outbox_worker.keys import KeyKind
from outbox_worker.model import FoundPayment
from outbox_worker.reconcile import backfill as by_hand
from outbox_worker.reconcile import owed as making
from outbox_worker.reconcile.backfill import BackfillReport
from outbox_worker.reconcile.owed import OwedPurchases
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.purchases import backfill_event_id
from tests.support.backfilling import Operator, always
from tests.support.factories import Payment, Shop, drain_all, hold_pair
from tests.support.makers import Connect, MakeProcessor

# --- what changes between the look and the write


def refund(shop: Shop, payment: Payment) -> None:
    shop.set_status(payment, "refunded")


def revoke(shop: Shop, payment: Payment) -> None:
    shop.purchase(payment, active=False)


def give(shop: Shop, payment: Payment) -> None:
    shop.purchase(student=payment.student_id, course=payment.course_id)


def waive(shop: Shop, payment: Payment) -> None:
    letter = shop.dead_letter(payment, state="discarded", reason="rejected_by_database")
    shop.rows("UPDATE dead_letters SET note = 'no' WHERE event_id = %s", letter)


def contradict(shop: Shop, payment: Payment) -> None:
    shop.dead_letter(payment, reason="payment_mismatch")


def forget(shop: Shop, payment: Payment) -> None:
    shop.rows("DELETE FROM payments WHERE id = %s", payment.id)


def reuse_its_mark(shop: Shop, payment: Payment) -> None:
    shop.mark(backfill_event_id(payment.id, KeyKind.UUID), "created", uuid4())


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("change", [refund, revoke, give, waive, contradict, forget, Shop.confirm])
def test_it_looks_again_before_it_writes(
    change: Callable[[Shop, Payment], None], operator: Operator, shop: Shop
) -> None:
    owed, changed = shop.payment(), shop.payment()
    work = operator.begin()
    assert work.look(always) == 2
    change(shop, changed)
    report = work.make(always)
    assert (report.counts.made.count, report.counts.explained.count, report.ok) == (1, 1, True)
    assert [
        row.payment_id
        for row in shop.rows("SELECT payment_id FROM purchases WHERE is_active AND payment_id IS NOT NULL")
    ] == [owed.id]


@pytest.mark.usefixtures("both_guards")
def test_what_is_not_written_and_not_explained_is_refused(operator: Operator, shop: Shop) -> None:
    """The mark names another payment, and ``decide`` grants nothing.

    But nothing explains the payment, either.
    """
    owed, changed = shop.payment(), shop.payment()
    work = operator.begin()
    assert work.look(always) == 2
    reuse_its_mark(shop, changed)
    report = work.make(always)
    assert [each.payment_id for each in report.made.created] == [owed.id]
    assert [each.payment.payment_id for each in report.made.refused] == [changed.id]
    assert report.made.refused[0].detail.startswith("event_id_reused: marked for payment")
    assert (report.counts.explained.count, report.ok) == (0, False)


def test_a_purchase_that_is_being_written_is_waited_for(operator: Operator, shop: Shop, connect: Connect) -> None:
    """Another transaction writes the inactive purchase of this payment and commits late.

    The backfill gets 23505 and looks again.
    """
    payment, other = shop.payment(), connect()
    neighbours = [shop.payment() for _ in range(4)]
    other.execute(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency, is_active)"
        " VALUES (%s, %s, %s, 1, 'EUR', false)",
        (*payment.pair, payment.id),
    )
    work = operator.begin()
    work.look(always)
    reports: list[BackfillReport] = []
    thread = threading.Thread(target=lambda: reports.append(work.make(always)))
    thread.start()
    turn = threading.Event()
    while not shop.scalar(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ):
        assert not turn.wait(0.01)
        assert thread.is_alive()
    other.commit()
    thread.join()
    (report,) = reports
    assert (report.counts.made.count, report.counts.explained.count, report.ok) == (len(neighbours), 1, True)
    assert [row.is_active for row in shop.purchases(payment)] == [False]


@pytest.mark.usefixtures("both_guards")
def test_a_pair_that_is_held_is_tried_again_at_the_end(operator: Operator, shop: Shop, connect: Connect) -> None:
    held, free, other = shop.payment(), shop.payment(), connect()
    hold_pair(other, held)
    work = operator.begin()
    work.look(always)

    def let_go(*_: float) -> bool:
        other.rollback()
        return True

    report = work.make(let_go)
    assert (report.counts.made.count, report.counts.contended.count, report.ok) == (2, 0, True)
    assert len(shop.purchases(free)) == 1


def test_a_pair_that_stays_held_is_told_and_found_again(
    operator: Operator, shop: Shop, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_hand, "ROUNDS", 1)
    monkeypatch.setattr(by_hand, "_ROUND_SECONDS", 0)
    held, other = shop.payment(), connect()
    shop.payment()
    hold_pair(other, held)
    report = operator.run()
    assert (report.counts.made.count, report.counts.contended.count, report.ok) == (1, 1, False)
    assert [each.payment_id for each in report.made.contended] == [held.id]
    assert shop.scalar("SELECT counts -> 'left' ->> 'count' FROM backfill_runs") == "1"
    other.rollback()
    assert operator.run().counts.made.count == 1


# --- what the database refuses


def refuse(shop: Shop, *payments: Payment) -> None:
    shop.rows("CREATE TABLE refused (payment_id uuid)")
    for payment in payments:
        shop.rows("INSERT INTO refused VALUES (%s)", payment.id)
    shop.rows(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF EXISTS (SELECT FROM refused r WHERE r.payment_id = NEW.payment_id) THEN RAISE 'not this one'; END IF;"
        " RETURN NEW; END $$"
    )


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("when", ["BEFORE INSERT", "deferred"])
def test_neighbours_of_a_refused_payment_are_made(when: str, operator: Operator, shop: Shop) -> None:
    payments = [shop.payment() for _ in range(40)]
    refuse(shop, payments[7], payments[23])
    shop.rows(
        "CREATE TRIGGER refuse BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION refuse()"
        if when == "BEFORE INSERT"
        else "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON purchases DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    report = operator.run()
    assert (report.counts.made.count, report.counts.refused.count, report.ok) == (38, 2, False)
    assert {each.payment.payment_id for each in report.made.refused} == {payments[7].id, payments[23].id}
    assert {each.detail for each in report.made.refused} == {"RaiseException, SQLSTATE P0001"}
    assert shop.scalar("SELECT counts -> 'refused' ->> 'count' FROM backfill_runs") == "2"
    assert shop.count("processed_events") == 38, "a mark stands and falls with its purchase"


def test_a_database_that_refuses_everything_is_in_trouble(operator: Operator, shop: Shop) -> None:
    shop.payment()
    shop.payment()
    shop.rows(
        "CREATE FUNCTION deny() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE insufficient_privilege; END $$"
    )
    shop.rows("CREATE TRIGGER deny BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION deny()")
    with pytest.raises(DBAPIError, match="insufficient_privilege"):
        operator.run()
    shop.rows("DROP TRIGGER deny ON purchases")
    assert operator.run().continued is not None


def found(payment: Payment) -> FoundPayment:
    told = payment.id, *payment.pair, Decimal(0), payment.currency, datetime.now(UTC), 0.0
    return FoundPayment(*told, (str(payment.student_id), str(payment.course_id)))


def test_the_index_may_vanish_on_the_way(database: Database, tables: Tables, settings: Settings, shop: Shop) -> None:
    owed = [found(shop.payment()) for _ in range(3)]
    repairs = OwedPurchases.start(database, tables, settings.retry_policy, GuardWatch(tables.purchases, lambda _: None))
    shop.rows("DROP INDEX purchases_active_student_course_key")
    (made,) = repairs.make(owed, lambda *_: None)
    assert len(made.created) == 3
    assert shop.doubled() == 0


def test_transactions_are_bounded(operator: Operator, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "CHUNK", 4)
    for _ in range(10):
        shop.payment()
    operator.run()
    sizes = shop.rows("SELECT count(*) FROM purchases GROUP BY xmin::text")
    assert sorted(size for (size,) in sizes) == [2, 4, 4]
    assert (
        shop.scalar("SELECT count(*) FROM purchases p JOIN processed_events m USING (payment_id) WHERE p.xmin = m.xmin")
        == 10
    )


# --- beside other writers


@pytest.mark.usefixtures("both_guards")
def test_the_daemon_and_a_backfill_make_one_purchase(
    make_processor: MakeProcessor, operator: Operator, shop: Shop
) -> None:
    """The event comes after the look. The second writer finds the purchase of the first."""
    payments = [shop.payment() for _ in range(4)]
    work = operator.begin()
    work.look(always)
    for payment in payments[:2]:
        shop.confirm(payment)
    drain_all(make_processor())
    report = work.make(always)
    assert (report.counts.made.count, report.counts.explained.count) == (2, 2)
    events = [shop.confirm(payment) for payment in payments]
    drain_all(make_processor())
    assert {shop.outcome_of(event) for event in events} == {"already_exists"}
    assert shop.count("purchases") == 4


def test_it_goes_no_faster_than_told(operator: Operator, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test has a clock of its own. It checks the waiting time and the pages."""
    for _ in range(20):
        shop.payment()
    now, pages = [100.0], list[int]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    work = operator.begin(max_rate=4.0, dry_run=True)
    work.look(lambda passed, _: not pages.append(passed))  # type: ignore[func-returns-value]
    assert pages[:5] == [4, 8, 12, 16, 20]
    assert now[0] - 100 >= 5
