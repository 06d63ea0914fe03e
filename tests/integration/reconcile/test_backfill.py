"""A backfill makes every purchase that payments prove to be owed, once, and no other purchase."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from outbox_worker.errors import Refused, SchemaError
from outbox_worker.keys import KeyKind
from outbox_worker.store.purchases import backfill_event_id
from tests.support.backfilling import Operator, discarded
from tests.support.factories import Payment, Shop

TABLES = ("payments", "outbox", "purchases", "processed_events", "dead_letters", "backfill_runs")


def never_written(shop: Shop) -> Payment:
    return shop.payment()


def deleted(shop: Shop) -> Payment:
    payment, event = shop.paid()
    shop.rows("DELETE FROM outbox WHERE event_id = %s", event)
    return payment


def marked_and_lost(shop: Shop) -> Payment:
    payment = shop.payment()
    shop.mark(uuid4(), "created", payment.id)
    return payment


def duplicate_no_more(shop: Shop) -> Payment:
    """Write a payment that was the second of its pair, after the first purchase became inactive."""
    payment = shop.payment()
    shop.mark(uuid4(), "duplicate_payment", payment.id)
    shop.purchase(student=payment.student_id, course=payment.course_id, active=False)
    return payment


def in_a_dead_letter(shop: Shop) -> Payment:
    payment = shop.payment()
    shop.dead_letter(payment, reason="payment_not_found")
    return payment


def told_under_another_type(shop: Shop) -> Payment:
    payment, _ = shop.paid(event_type="RECEIPT_SENT")
    return payment


OWED = [never_written, deleted, marked_and_lost, duplicate_no_more, in_a_dead_letter, told_under_another_type]


def with_purchase(shop: Shop, **given: Any) -> Payment:
    payment = shop.payment()
    shop.purchase(payment, **given)
    return payment


def of_a_held_pair(shop: Shop) -> Payment:
    other = with_purchase(shop)
    return shop.payment(student=other.student_id, course=other.course_id)


def beside_a_gift(shop: Shop) -> Payment:
    payment = shop.payment()
    shop.purchase(student=payment.student_id, course=payment.course_id)
    return payment


EXPLAINED: dict[str, Callable[[Shop], object]] = {
    "active": with_purchase,
    "revoked": lambda shop: with_purchase(shop, active=False),
    "duplicate": of_a_held_pair,
    "gift": beside_a_gift,
    "in flight": lambda shop: shop.paid(),
    "postponed": lambda shop: shop.paid(due_in="1 hour", attempts=9),
    "in flight, in capitals": lambda shop: (
        payment := shop.payment(),
        shop.confirm(payment, payload={"payment_id": str(payment.id).upper()}),
    ),
    "mismatch": lambda shop: shop.dead_letter(shop.payment(), reason="payment_mismatch"),
    "id reused": lambda shop: shop.dead_letter(shop.payment(), reason="event_id_reused"),
    "waived": lambda shop: discarded(shop, "a gift of the house"),
    "pending": lambda shop: shop.payment(status="pending"),
    "failed": lambda shop: shop.payment(status="failed"),
    "refunded": lambda shop: shop.payment(status="refunded"),
}


def snapshot(shop: Shop, *but: str) -> dict[str, str]:
    return {
        table: shop.scalar(f"SELECT count(*) || md5(string_agg(t::text, E'\\n' ORDER BY t::text)) FROM {table} t") or ""
        for table in TABLES
        if table not in but
    }


# --- what is made, and what is not


@pytest.mark.usefixtures("both_guards")
def test_owed_for_six_reasons_among_all_that_is_not(order: str, operator: Operator, shop: Shop) -> None:
    for explained in EXPLAINED.values():
        explained(shop)
    owed = {reason(shop).id for reason in OWED for _ in range(3)}
    before = shop.count("purchases")
    report = operator.run(reason="the shop was down", max_repairs=18)
    assert {each.payment_id for each in report.owed} == owed
    assert (report.counts.made.count, report.counts.looked_at) == (18, shop.count("payments"))
    assert report.counts.made.written() == {"count": 18, "money": {"EUR": "898.20"}}
    assert order
    assert shop.count("purchases") == before + 18
    assert {row.payment_id for row in shop.rows("SELECT payment_id FROM purchases WHERE is_active")} >= owed
    assert shop.doubled() == 0
    assert (report.ok, report.duplicates) == (True, [])
    again = operator.run()
    assert (again.counts.owed.count, again.counts.made.count) == (0, 0)


@pytest.mark.parametrize("kind", EXPLAINED)
def test_what_is_explained_is_left_as_it_is(kind: str, operator: Operator, shop: Shop) -> None:
    EXPLAINED[kind](shop)
    before = snapshot(shop, "backfill_runs")
    report = operator.run()
    assert (report.counts.owed.count, report.counts.made.count) == (0, 0)
    assert snapshot(shop, "backfill_runs") == before


@pytest.mark.parametrize(
    "letter",
    [
        {"reason": "unsupported_event_type", "event_type": "COURSE_VIEWED"},
        {"reason": "payment_mismatch", "event_type": "PURCHASE_REFUNDED"},
        {"reason": "payment_not_refunded", "event_type": "PURCHASE_REFUNDED"},
        {"reason": "payment_not_succeeded"},
        {"reason": "payment_not_found"},
    ],
)
def test_a_discarded_letter_that_says_nothing_of_this_purchase_explains_nothing(
    operator: Operator, shop: Shop, letter: dict[str, str]
) -> None:
    """The dead letter is of another event type, or older than the success of the payment."""
    payment = discarded(shop, "not ours", **letter)
    operator.run()
    assert shop.purchases(payment)


def test_a_discarded_letter_without_a_reason_explains_nothing(operator: Operator, shop: Shop) -> None:
    payment = discarded(shop, None)
    operator.run()
    assert len(shop.purchases(payment)) == 1


def test_the_purchase_is_the_payment_s_own_with_a_mark_that_sql_can_find(
    both_guards: str, operator: Operator, shop: Shop
) -> None:
    payment = shop.payment(amount="12.34", currency="CHF")
    operator.run()
    (purchase,) = shop.purchases(payment)
    assert (purchase.student_id, purchase.course_id) == payment.pair
    assert (str(purchase.amount), purchase.currency, purchase.is_active) == ("12.34", "CHF", True)
    (mark,) = shop.rows(
        "SELECT m.* FROM processed_events m JOIN payments p"
        " ON m.event_id = CAST(md5('purchase-outbox-worker:' || CAST(p.id AS text)) AS uuid)"
    )
    assert mark.event_id == backfill_event_id(payment.id, KeyKind.UUID)
    assert (mark.event_type, mark.outcome, mark.payment_id) == ("PURCHASE_BACKFILLED", "created", payment.id)
    assert mark.recovered_at is None
    assert both_guards


def test_what_a_backfill_made_and_somebody_lost_is_recovered(operator: Operator, shop: Shop) -> None:
    payment = shop.payment()
    operator.run()
    shop.rows("DELETE FROM purchases")
    report = operator.run()
    assert (report.counts.made.count, report.counts.recovered.count) == (1, 1)
    mark = shop.mark_of(backfill_event_id(payment.id, KeyKind.UUID))
    assert (mark.outcome, mark.recovered_at is not None) == ("recovered", True)


def test_the_letters_that_asked_for_it_are_closed(operator: Operator, shop: Shop) -> None:
    payment = shop.payment()
    letters = [shop.dead_letter(payment, reason=reason) for reason in ("payment_not_found", "crashed_worker")]
    others = [
        shop.dead_letter(payment, event_type="RECEIPT", reason="unsupported_event_type"),
        shop.dead_letter(of_a_held_pair(shop), reason="payment_not_found"),
    ]
    operator.run()
    assert [shop.letter_of(each).state for each in letters] == ["settled", "settled"]
    assert all(shop.letter_of(each).resolved_at for each in letters)
    assert [shop.letter_of(each).state for each in others] == ["open", "open"]


@pytest.mark.usefixtures("both_guards")
def test_of_a_pair_the_oldest_payment_is_granted(order: str, operator: Operator, shop: Shop) -> None:
    """The oldest payment is granted on whatever page it is.

    The others are reported as duplicates.
    """
    first = [shop.payment(ago="3 days") for _ in range(20)]
    later = [shop.payment(student=each.student_id, course=each.course_id, ago="2 days") for each in first]
    later += [shop.payment(student=each.student_id, course=each.course_id, ago="1 day") for each in first[:5]]
    report = operator.run(max_rate=1e6)
    assert {each.payment_id for each in report.owed} == {each.id for each in first}
    assert {each.payment_id for each in report.duplicates} == {each.id for each in later}
    assert (report.counts.made.count, report.counts.duplicates.count) == (20, 25)
    assert {row.payment_id for row in shop.purchases()} == {each.id for each in first}
    assert shop.doubled() == 0
    assert order


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("kind", ["json", "text"])
def test_an_outbox_of_documents(kind: str, operator: Operator, shop: Shop) -> None:
    """One payment has an event. The payload of that event is a document that jsonb would refuse."""
    shop.rows(f"ALTER TABLE outbox ALTER payload TYPE {kind}")
    in_flight, owed = shop.payment(), shop.payment()
    shop.rows(
        "INSERT INTO outbox (event_id, event_type, payload)"
        f" VALUES (gen_random_uuid(), 'PURCHASE_CONFIRMED', CAST(%s AS {kind}))",
        f'{{"payment_id": "{str(in_flight.id).upper()}", "more": "\\u0000"}}',
    )
    assert operator.run().counts.made.count == 1
    assert (len(shop.purchases(in_flight)), len(shop.purchases(owed))) == (0, 1)


def test_payments_of_the_last_minutes_are_left_to_the_workers(operator: Operator, shop: Shop) -> None:
    fresh, old = shop.payment(ago="4 minutes"), shop.payment(ago="6 minutes")
    operator.run(older_than=timedelta(minutes=5))
    assert (len(shop.purchases(fresh)), len(shop.purchases(old))) == (0, 1)


def test_a_range_includes_since_and_not_until(order: str, operator: Operator, shop: Shop) -> None:
    at = datetime(2026, 3, 1, tzinfo=UTC)
    moments = [at - timedelta(microseconds=1), at, at + timedelta(hours=1, microseconds=-1), at + timedelta(hours=1)]
    payments = [shop.payment() for _ in moments]
    for payment, moment in zip(payments, moments, strict=True):
        shop.rows("UPDATE payments SET created_at = %s WHERE id = %s", moment, payment.id)
    operator.run(since=at, until=at + timedelta(hours=1))
    assert [len(shop.purchases(payment)) for payment in payments] == [0, 1, 1, 0]
    assert order


# --- the look at all payments, and the fuse


def test_a_dry_run_says_the_same_and_writes_nothing(operator: Operator, shop: Shop) -> None:
    for reason in OWED:
        reason(shop)
    twice = shop.payment(ago="1 day")
    shop.payment(student=twice.student_id, course=twice.course_id)
    before = snapshot(shop)
    dry = operator.run(dry_run=True)
    assert snapshot(shop) == before
    assert shop.count("backfill_runs") == 0
    real = operator.run()
    for number in ("looked_at", "unexplained", "owed", "duplicates"):
        assert getattr(dry.counts, number) == getattr(real.counts, number)
    assert dry.counts.owed == real.counts.made
    assert (dry.counts.owed.count, dry.counts.duplicates.count, dry.counts.made.count) == (7, 1, 0)
    assert [each.payment_id for each in dry.owed] == [each.payment_id for each in real.owed]


def act_as(shop: Shop, change: str) -> None:
    """Change a setting of the database for all new connections."""
    shop.rows(f"ALTER DATABASE {shop.scalar('SELECT quote_ident(current_database())')} {change}")


def test_a_dry_run_needs_to_read_and_no_more(operator: Operator, shop: Shop) -> None:
    shop.payment()
    shop.rows("CREATE ROLE looker_of_backfills")
    try:
        shop.rows(
            "GRANT SELECT ON payments, outbox, purchases, processed_events, dead_letters, workers"
            " TO looker_of_backfills"
        )
        operator.database.engine.dispose()
        shop.rows(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET role = looker_of_backfills', current_database()); END $$"
        )
        assert operator.run(dry_run=True).counts.owed.count == 1
        with pytest.raises(SchemaError, match="INSERT"):
            operator.run()
    finally:
        operator.database.engine.dispose()
        act_as(shop, "RESET role")
        shop.rows("DROP OWNED BY looker_of_backfills; DROP ROLE looker_of_backfills")


def test_more_than_expected_stops_before_anything_is_made(operator: Operator, shop: Shop) -> None:
    for _ in range(4):
        shop.payment()
    before = snapshot(shop, "backfill_runs")
    with pytest.raises(Refused, match=r"4 payments \(199\.60 EUR\), .* --max-repairs 4\.$"):
        operator.run(max_repairs=3)
    assert snapshot(shop, "backfill_runs") == before
    (run,) = shop.rows("SELECT outcome, finished_at, counts FROM backfill_runs")
    assert (run.outcome, run.finished_at is not None, run.counts["made"]["count"]) == ("refused", True, 0)
    assert operator.run(max_repairs=4).counts.made.count == 4


def test_who_did_it_and_why_is_kept(operator: Operator, shop: Shop) -> None:
    shop.payment()
    operator.run(actor="ada", reason="ticket 12")
    (run,) = shop.rows("SELECT * FROM backfill_runs")
    assert (run.kind, run.actor, run.reason, run.outcome, run.is_full) == ("operator", "ada", "ticket 12", "made", True)
    assert run.counts["made"] == {"count": 1, "money": {"EUR": "49.90"}}
    assert run.counts["left"] == run.counts["carried"] == {"count": 0, "money": {}}
