"""What payments prove is owed is made, once, and nothing else; whoever is in the way, and wherever it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from outbox_worker import backfill as by_hand
from outbox_worker import repairs as making
from outbox_worker.backfill import Backfill, BackfillReport, Request
from outbox_worker.database import Database
from outbox_worker.errors import Refused, SchemaError
from outbox_worker.guard import GuardWatch
from outbox_worker.purchases import backfill_event_id
from outbox_worker.repairs import Repairs
from outbox_worker.schema import Tables
from outbox_worker.settings import Settings
from outbox_worker.sweep import FoundPayment
from tests.support.factories import Payment, Shop, drain_all, hold_pair
from tests.support.makers import MakeProcessor

Connect = Callable[..., psycopg.Connection[Any]]
TABLES = ("payments", "outbox", "purchases", "processed_events", "dead_letters", "backfill_runs")


def always(*_: float) -> bool:
    return True


class Operator:
    """Somebody who starts backfills on the test's database."""

    def __init__(self, database: Database, tables: Tables, settings: Settings) -> None:
        self.database, self.tables, self.policy = database, tables, settings.retry_policy

    def begin(self, **asked: Any) -> Backfill:
        request = Request(**{"actor": "somebody", "older_than": timedelta(0), **asked})
        return Backfill(self.database, self.tables, self.policy, request)

    def run(self, **asked: Any) -> BackfillReport:
        work = self.begin(**asked)
        work.look(always)
        return work.make(always)


@pytest.fixture
def operator(database: Database, tables: Tables, settings: Settings) -> Operator:
    return Operator(database, tables, settings)


@pytest.fixture(params=["id", "created_at"])
def order(request: pytest.FixtureRequest, shop: Shop) -> str:
    if request.param == "created_at":
        shop.rows("CREATE INDEX ON payments (created_at, id)")
    return str(request.param)


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
    """It was the second of its pair; what held the pair is gone."""
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


def discarded(shop: Shop, note: str | None, reason: str = "crashed_worker", **of_letter: Any) -> Payment:
    payment = shop.payment()
    letter = shop.dead_letter(payment, state="discarded", reason=reason, **of_letter)
    shop.rows("UPDATE dead_letters SET note = %s WHERE event_id = %s", note, letter)
    return payment


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
    """Of an event of another type, or of a time when the payment was not there or had not succeeded."""
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
    assert mark.event_id == backfill_event_id(payment.id)
    assert (mark.event_type, mark.outcome, mark.payment_id) == ("PURCHASE_BACKFILLED", "created", payment.id)
    assert mark.recovered_at is None
    assert both_guards


def test_what_a_backfill_made_and_somebody_lost_is_recovered(operator: Operator, shop: Shop) -> None:
    payment = shop.payment()
    operator.run()
    shop.rows("DELETE FROM purchases")
    report = operator.run()
    assert (report.counts.made.count, report.counts.recovered.count) == (1, 1)
    mark = shop.mark_of(backfill_event_id(payment.id))
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
    """Whichever page it is on; the others are duplicates, told and not granted."""
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
    """What is no JSON beside an event that explains its payment."""
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


# --- looking and the fuse


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
    """Whoever connects from now on."""
    shop.rows(f"ALTER DATABASE {shop.scalar('SELECT quote_ident(current_database())')} {change}")


def test_a_dry_run_needs_to_read_and_no_more(operator: Operator, shop: Shop) -> None:
    shop.payment()
    shop.rows("CREATE ROLE looker_of_backfills")
    try:
        shop.rows("GRANT SELECT ON payments, outbox, purchases, processed_events, dead_letters TO looker_of_backfills")
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
    with pytest.raises(Refused, match=r"4 payments \(199\.60 EUR\) .* --max-repairs 4\.$"):
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


# --- what changes between the look and the writing


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
    shop.mark(backfill_event_id(payment.id), "created", uuid4())


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("change", [refund, revoke, give, waive, contradict, forget, reuse_its_mark, Shop.confirm])
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


def test_a_purchase_that_is_being_written_is_waited_for(operator: Operator, shop: Shop, connect: Connect) -> None:
    """Somebody writes the revoked purchase of this payment and has not committed: 23505, and another look."""
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
    report = work.make(lambda *_: bool(other.rollback()) or True)
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
    return FoundPayment(payment.id, *payment.pair, 0, payment.currency, datetime.now(UTC), 0.0)  # type: ignore[arg-type]


def test_the_index_may_vanish_on_the_way(database: Database, tables: Tables, settings: Settings, shop: Shop) -> None:
    owed = [found(shop.payment()) for _ in range(3)]
    repairs = Repairs(database, tables, settings.retry_policy, GuardWatch(tables.purchases, lambda _: None))
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


# --- stopped in the middle


class Killed(BaseException):
    """Stands for kill -9: nothing is written down any more."""


def kill_after(transactions: int) -> Callable[..., bool]:
    told = [0]

    def tell(*_: float) -> bool:
        told[0] += 1
        if told[0] >= transactions:
            raise Killed
        return True

    return tell


@pytest.mark.usefixtures("both_guards")
def test_one_that_was_killed_is_continued(
    order: str, operator: Operator, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "CHUNK", 3)
    twice = [shop.payment(ago="2 days") for _ in range(10)]
    for each in twice[:4]:
        shop.payment(student=each.student_id, course=each.course_id, ago="1 day")
    work = operator.begin()
    work.look(always)
    with pytest.raises(Killed):
        work.make(kill_after(2))
    assert shop.count("purchases") == 6
    (run,) = shop.rows("SELECT * FROM backfill_runs")
    assert (run.finished_at, run.outcome, run.counts["made"]["count"]) == (None, None, 6)
    assert len(run.cursor) == (1 if order == "id" else 2)
    report = operator.run(actor="somebody else")
    assert report.continued is not None
    assert report.continued.id == run.id
    assert (report.counts.made.count, report.counts.looked_at, report.counts.owed.count) == (10, 14, 10)
    assert len(report.owed) == 4, "behind the cursor nothing is looked at twice"
    assert {row.payment_id for row in shop.purchases()} == {each.id for each in twice}
    assert shop.count("backfill_runs") == 1
    assert shop.scalar("SELECT counts -> 'left' ->> 'count' FROM backfill_runs") == "0"
    assert operator.run().continued is None


def test_one_that_was_killed_before_it_made_anything_begins_anew(operator: Operator, shop: Shop) -> None:
    shop.payment()
    with pytest.raises(Killed):
        operator.begin().look(kill_after(1))
    report = operator.run()
    assert report.continued is not None
    assert (report.counts.made.count, report.counts.looked_at) == (1, 1)


def test_another_range_is_another_backfill(operator: Operator, shop: Shop) -> None:
    shop.payment()
    operator.begin()
    assert operator.run(since=datetime(2020, 1, 1, tzinfo=UTC)).continued is None
    assert operator.run(dry_run=True).continued is None
    assert operator.run().continued is not None


def test_one_that_lives_is_left_alone(operator: Operator, shop: Shop) -> None:
    """On another host, and heard of lately; then silent for a minute; then for so long that it is forgotten."""
    shop.payment()
    operator.begin()
    shop.rows("UPDATE backfill_runs SET host = 'elsewhere'")
    assert operator.run(dry_run=False).continued is None
    shop.rows("DELETE FROM backfill_runs WHERE finished_at IS NOT NULL")
    shop.rows("UPDATE backfill_runs SET seen_at = clock_timestamp() - interval '61 seconds'")
    assert operator.run().continued is not None
    operator.begin()
    shop.rows("UPDATE backfill_runs SET seen_at = clock_timestamp() - interval '25 hours' WHERE finished_at IS NULL")
    assert operator.run().continued is None


def test_the_cursor_stays_before_a_pair_that_is_held(
    operator: Operator, shop: Shop, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a backfill that goes on from there would never come back to it."""
    monkeypatch.setattr(making, "CHUNK", 2)
    payments = sorted((shop.payment() for _ in range(6)), key=lambda each: each.id.int)
    other = connect()
    hold_pair(other, payments[2])
    work = operator.begin()
    work.look(always)
    with pytest.raises(Killed):
        work.make(kill_after(3))
    assert [UUID(each) for each in shop.scalar("SELECT cursor FROM backfill_runs")] == [payments[1].id]
    assert shop.count("purchases") == 5
    other.rollback()
    report = operator.run()
    assert (report.counts.made.count, report.counts.contended.count) == (6, 0)
    assert shop.count("purchases") == 6


def test_an_index_that_comes_or_goes_moves_nobody_s_cursor(
    operator: Operator, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "CHUNK", 2)
    for hours in range(6):
        shop.payment(ago=f"{hours} hours")
    work = operator.begin()
    work.look(always)
    with pytest.raises(Killed):
        work.make(kill_after(1))
    shop.rows("CREATE INDEX ON payments (created_at, id)")
    assert operator.run().counts.made.count == 6


# --- beside others


@pytest.mark.usefixtures("both_guards")
def test_the_daemon_and_a_backfill_make_one_purchase(
    make_processor: MakeProcessor, operator: Operator, shop: Shop
) -> None:
    """The event comes after the look; the one that writes second finds the purchase of the first."""
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
    """By a clock of the test's own: what it waited, and in what pages it went."""
    for _ in range(20):
        shop.payment()
    now, pages = [100.0], list[int]()
    monkeypatch.setattr(by_hand.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(by_hand.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    work = operator.begin(max_rate=4.0, dry_run=True)
    work.look(lambda passed, _: not pages.append(passed))  # type: ignore[func-returns-value]
    assert pages[:5] == [4, 8, 12, 16, 20]
    assert now[0] - 100 >= 5
